"""How much the algorithm files repeat each other: blocks of five equal lines of code in two files of the folder.

Lines are compared without their indentation; blank lines, comments, docstrings and imports do not count as code.

    python benchmarks/repetition.py [--folder src/warmfed/algorithms] [--lines 5] [--out benchmarks/results/repetition.json]
"""

import argparse
import ast
from itertools import combinations
from pathlib import Path

from warmfed.utils.files import write_json


def code(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of every line of code."""
    text = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        strings = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if strings or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [(number, line.partition("  # ")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in lines if number not in left_out and line and not line.startswith("#")]


def blocks(one: list[tuple[int, str]], other: list[tuple[int, str]], size: int) -> list[tuple[int, int, int]]:
    """(first line in one, first line in the other, lines) of the longest equal blocks of at least `size` lines."""
    found = []
    for i in range(len(one)):
        for j in range(len(other)):
            if one[i][1] != other[j][1] or (i and j and one[i - 1][1] == other[j - 1][1]):
                continue  # not equal, or the middle of a longer block
            length = 0
            while i + length < len(one) and j + length < len(other) and one[i + length][1] == other[j + length][1]:
                length += 1
            if length >= size:
                found.append((one[i][0], other[j][0], length))
    return found


def repetition(folder: Path, size: int) -> list[dict[str, object]]:
    """Every repeated block of a folder's files."""
    files = {path.relative_to(folder).as_posix(): code(path) for path in sorted(folder.rglob("*.py"))}
    return [
        {"files": [a, b], "lines": [first, second], "length": length}
        for a, b in combinations(files, 2)
        for first, second, length in blocks(files[a], files[b], size)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("src/warmfed/algorithms"))
    parser.add_argument("--lines", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = repetition(args.folder, args.lines)
    for block in found:
        print(block)
    print(f"{len(found)} blocks of {args.lines} equal lines in {len(list(args.folder.rglob('*.py')))} files")
    if args.out:
        write_json(
            args.out,
            {
                "folder": args.folder.as_posix(),
                "lines": args.lines,
                "files": len(list(args.folder.rglob("*.py"))),
                "blocks": found,
            },
        )


if __name__ == "__main__":
    main()
