"""Comparisons and sweeps: many runs under one protocol, and their tables."""
