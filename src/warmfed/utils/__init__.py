"""Helpers without torch that know nothing of federated learning."""
