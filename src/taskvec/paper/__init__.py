"""What is known of the paper without reading anything: its numbers and its eight tasks."""
