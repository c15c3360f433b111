"""Training a generator's base on public images."""
