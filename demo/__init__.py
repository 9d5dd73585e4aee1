"""The whole way, once, on a small scale: `make demo`."""
