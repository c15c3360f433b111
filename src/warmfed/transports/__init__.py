"""Transports: connections to the clients. They are independent of the algorithm."""
