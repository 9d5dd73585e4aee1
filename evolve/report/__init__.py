"""Reports of a system and its searches: what is computed (no torch, no drawing), and what is drawn and written from it."""
