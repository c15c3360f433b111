"""Evaluation of generators: feature extractors and metrics of their samples."""
