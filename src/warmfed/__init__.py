"""Federated learning that gives every site a strong global and a strong personal image classifier in one to five rounds."""

__version__ = "0.1.0"
