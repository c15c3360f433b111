"""For the operator of a deployment: a ready project with certificates and keys, preflight, and what has left a site."""
