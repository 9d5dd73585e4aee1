"""How fast routes in pieces answer, in how much memory, and what reloads do to that: the figures S1 to S11. `__main__` lists them."""
