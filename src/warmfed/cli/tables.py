"""Output of `warmfed doctor` and `warmfed run --dry-run`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from ..report.parts import duration, memory, size
from ..runs.console import PlainTable
from ..runs.doctor import File


def files_table(files: Sequence[File]) -> PlainTable:
    """Return a table with a row for each file."""
    table = PlainTable(box=None, pad_edge=False)
    for header in ("file", "", "size", "SHA-256", "where"):
        table.add_column(header, justify="right" if header == "size" else "left", overflow="fold")
    for each in files:
        mark = Text("there", "green") if each.there else Text("missing", "bold red")
        table.add_row(each.what, mark, size(each.bytes) if each.there else "", each.sha256[:12], each.path)
    return table


def dry_run_table(found: Mapping[str, Any]) -> PlainTable:
    """Return a table with a row for each kind of work."""
    table = PlainTable(box=None, pad_edge=False)
    for header in ("work", "at", "how much", "about", "memory"):
        table.add_column(header, justify="left" if header in ("work", "at") else "right")
    for each in found["work"]:
        amount = f"{each['count']:,} {each['unit']}"
        table.add_row(each["what"], each["where"], amount, duration(each["seconds"]), memory(each["memory"] / 1e6))
    return table


def dry_run_facts(found: Mapping[str, Any]) -> str:
    """Return lines with the totals of a dry run."""
    stages = ", ".join(f"{name} × {count}" if count > 1 else name for name, count in found["stages"].items())
    lines = [
        f"{found['algorithm']}: {found['sites']} sites, {found['images']:,} images, {found['classes']} classes; {stages}",
        f"about {duration(found['seconds'])} in all (on {found['timed_on']}); memory {memory(found['memory'] / 1e6)} by count",
    ]
    if found["base"]:
        there = "its weights are there" if found["base"]["there"] else "its weights are not there: `warmfed doctor` says which"
        lines.append(f"base {found['base']['name']}, {size(found['base']['bytes'])}: {there}")
        lines.append(f"a site sends {size(found['adapter'])} before the rounds")
    return "\n".join(lines)
