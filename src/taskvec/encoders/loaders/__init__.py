"""How the encoders of each kind of address are made, and their weights read."""
