"""The command line: `warmfed`."""

from .parser import main

__all__ = ["main"]
