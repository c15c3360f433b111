"""The report: one HTML file that opens offline, made from a run folder or a comparison.

It reads only JSON and PNG files, and does not import torch.
"""

from .comparison import by_rounds, latex, markdown, table, tests, write_comparison
from .page import write
from .parts import Table

__all__ = ["Table", "by_rounds", "latex", "markdown", "table", "tests", "write", "write_comparison"]
