"""What every wing stands on: errors, notes, settings, files, device and precision, task types, the training loop."""
