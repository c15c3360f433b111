"""Every algorithm by its name on the command line."""
