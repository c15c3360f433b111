"""The command `warmfed-supernode`: Flower's SuperNode, which also ends its process when it has ended its work.

Flower (seen in 1.41) takes a TLS connection that is cut in the middle (`UNEXPECTED_EOF_WHILE_READING`) for the end, and then
neither hears nor exits, as its own server's thread lives on: nobody would start it again.
"""

import os
from importlib.metadata import entry_points
from typing import NoReturn


def main() -> NoReturn:
    (command,) = entry_points(group="console_scripts", name="flower-supernode")
    command.load()()  # reads the words of the command line, and exits by itself where it is told to
    os._exit(1)
