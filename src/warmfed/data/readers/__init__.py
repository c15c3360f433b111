"""Readers: one for each storage format of images."""
