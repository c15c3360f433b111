"""Pages: sections in one self-contained HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warmfed.utils.files import atomic_write

from . import accuracy, generators, sections
from .parts import Section, duration, memory, size
from .record import Run, read_run


def write(folder: Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write `folder`/report.html from the files of the run in `folder`, atomically, and return its path.

    A run without synthetic images, adapters, a selector or a gate has no section on them.

    Args:
        folder: the run folder.
        summary: content of summary.json, if the file is not written yet.

    Raises:
        InputError: if a file is missing or damaged.
    """
    run = read_run(folder, summary)
    drawing = run.summary.get("task") == "denoise"
    found = (
        *(generators.sections(run) if drawing else (accuracy.progress(run), accuracy.final(run))),
        sections.pictures(run),
        sections.feature_map(run),
        sections.adapters(run),
        generators.adapters(run),
        sections.samples(run),
        sections.selector(run),
        sections.gate(run),
        sections.communication(run),
        sections.time_and_memory(run),
        sections.provenance(run),
    )
    summary = run.summary
    return publish(
        folder / "report.html",
        title=f"{summary['algorithm']} on {summary['federation']}",
        subtitle=_subtitle(run),
        tiles=generators.tiles(run) if drawing else accuracy.tiles(run),
        facts=_facts(summary),
        marks=_marks(summary),
        sections=[section for section in found if section is not None],
    )


def _subtitle(run: Run) -> str:
    rounds = run.summary["rounds"]
    parts = [
        "one-shot" if not rounds else f"{rounds} round{'s' * (rounds != 1)}",
        f"{len(run.sites)} site{'s' * (len(run.sites) != 1)}",
        f"seed {run.summary['seed']}",
    ]
    if run.report_images is not None:
        parts.insert(2, f"{len(run.report_images.classes)} classes")
    return " · ".join(parts)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Upload per site", size(summary["bytes_up_per_site"])),
        ("Download per site", size(summary["bytes_down_per_site"])),
        ("Time", duration(summary["seconds"])),
        ("Peak memory", memory(summary["peak_memory_mb"])),
    ]


def _marks(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, short form, full form) of each hash that identifies the run."""
    named = [("data", "data_sha256"), ("base", "base_sha256"), ("history", "history_sha256")]
    marks = [(name, summary[key][:12], summary[key]) for name, key in named if summary.get(key)]
    return [("warmfed", summary["warmfed"], summary["warmfed"]), *marks]


def publish(
    path: Path,
    *,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    tiles: Sequence[Mapping[str, Any]] = (),
    facts: Sequence[tuple[str, str]] = (),
    marks: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """Render the page and write it to `path`, atomically. All values are escaped, except the plots' SVG."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("warmfed.report")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = pages.get_template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, tiles=tiles, facts=facts, marks=marks
    )
    atomic_write(path, html)
    return path
