"""Training and validating the children of a generation."""
