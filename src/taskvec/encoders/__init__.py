"""Pre-trained encoders by address."""
