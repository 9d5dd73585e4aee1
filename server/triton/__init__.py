"""A real Triton that serves the model repository: its environment, its process, what keeps it serving."""
