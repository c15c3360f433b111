"""How good a generator's samples are."""
