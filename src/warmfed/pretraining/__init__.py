"""Pre-training of a generator's base on public images."""
