"""Tasks: images with labels from folders, from data that libraries ship, or rendered, in training, validation and test splits."""
