"""What the search and the server share: the generated contract, preprocessing, rules for names. Never imports torch."""

__version__ = "0.1.0"
