"""What a study takes before it runs: time, work, disk, memory, downloads."""
