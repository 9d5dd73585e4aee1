"""What runs within Triton, not within the server: see `model.py`."""
