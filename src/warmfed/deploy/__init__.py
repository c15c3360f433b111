"""Deployment over Flower: projects with certificates and keys, checks, server and site apps, and the sites' ledgers."""
