"""What everything stands on: errors, notes, settings, device and precision, kinds of task, the one training loop."""
