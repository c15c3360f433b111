"""Sections of a run's page on samples, decisions, messages and costs. A function returns None if it has no data."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from warmfed.utils.errors import InputError

from . import plots
from .accuracy import mean
from .parts import Cell, Figure, Picture, Section, Table, cells, duration, memory, number, signed, size, without_gaps
from .record import ReportImages, Run

MOST_SITES = 12  # maximum sites with images and features
MOST_POINTS = 1500  # maximum points of a feature map; GROUND of them are its grey background
GROUND = 400
MOST_NAMES = 12  # maximum class names in a feature map
LOSSLESS = 900_000  # maximum bytes of PNG files in a page; larger pictures become WebP


def pictures(run: Run) -> Section | None:
    """Return the section with real and synthetic images, one row per class."""
    found = run.report_images
    if found is None or not any(found.images.values()):
        return None
    sites = [site for site in found.images if found.images[site]][:MOST_SITES]
    small = sum(len(data) for site in sites for data in found.images[site].values()) > LOSSLESS
    shown = [
        Picture(
            site,
            tuple(
                (kind, *embed(found.images[site][kind], f"{kind} images of {site}", len(found.classes), small=small))
                for kind in ("real", "synthetic")
                if kind in found.images[site]
            ),
        )
        for site in sites
    ]
    title, how = "Images of the sites", "A row per class."
    if any("synthetic" in found.images[site] for site in sites):
        title = "Real beside synthetic images"
        drawn = (
            "samples of that site’s own model, of which the auxiliary set is made"
            if run.summary.get("task") == "denoise"
            else "samples of the shared generator with that site’s adapter"
        )
        how += (
            f" On the left are images of the site itself; on the right: {drawn}. "
            "They should resemble the left in style and show the row’s class, without copies of images."
        )
    if small:
        how += " Compressed for this page."
    if len(sites) < len(found.images):
        how += f" The first {len(sites)} of {len(found.images)} sites are shown."
    return Section("images", title, how, pictures=shown, classes=found.classes)


def embed(data: bytes, what: str, rows: int, *, small: bool) -> tuple[str, int]:
    """Return a picture as a data URI, and the number of square cells per row.

    Args:
        data: a PNG file.
        what: name of the picture, for error messages.
        rows: number of rows of cells.
        small: whether to convert it to WebP.

    Raises:
        InputError: if `data` does not decode as PNG.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            across = max(round(image.width * rows / image.height), 1)
            if small:
                target = io.BytesIO()
                image.convert("RGB").save(target, "WEBP", quality=82, method=4)
                data = target.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"the {what} in the run's report images do not decode as PNG ({error}); restore the folder report_images, "
            "or delete it for a report without pictures"
        ) from error
    return f"data:image/{'webp' if small else 'png'};base64,{base64.b64encode(data).decode()}", across


def feature_map(run: Run) -> Section | None:
    """Return the section with the t-SNE of real and synthetic features, one plot per site."""
    found = run.report_images
    if found is None or not found.features:
        return None
    points = found.features[:: -(-len(found.features) // MOST_POINTS)]
    ground = [(point["x"], point["y"]) for point in points[:: -(-len(points) // GROUND)]]
    sites = sorted({point["site"] for point in points})
    both = any(point["kind"] == "synthetic" for point in points)
    figures = []
    section = Section("features", "Real and synthetic features", "", classes=found.classes, small=True)
    for index, site in enumerate(sites[:MOST_SITES]):
        kinds = {
            kind: [(point["x"], point["y"]) for point in points if (point["site"], point["kind"]) == (site, kind)]
            for kind in ("real", "synthetic")
        }
        alt = (
            f"Map of features of {site}: {len(kinds['real'])} real and {len(kinds['synthetic'])} synthetic images, "
            "the other sites in grey."
        )
        svg = plots.features(
            f"map-{index}",
            alt,
            ground,
            kinds["real"],
            kinds["synthetic"],
            _centres(found, site, named=section.names_fit),
            index,
        )
        figures.append(Figure(site, svg, alt, key=(("●", "real"), ("×", "synthetic")) if both else ()))
    how = (
        "Each point is the classifier’s features of an image, mapped by t-SNE. Neighbours are similar; distances between "
        "far groups mean little. Names are near the centre of a class’s real images."
    )
    if not both:
        return replace(section, title="Features of the images", how=how, figures=figures)
    how += " If the crosses are among the dots of their class, synthetic images resemble real ones."
    return replace(section, how=how, figures=figures)


def _centres(images: ReportImages, site: str, *, named: bool) -> dict[str, tuple[float, float]]:
    """Return the centre of each class's real images at `site`, by name or number; empty if there are too many classes."""
    if len(images.classes) > MOST_NAMES:
        return {}
    found: dict[str, tuple[float, float]] = {}
    for index, name in enumerate(images.classes):
        mine = [p for p in images.features if (p["site"], p["kind"], p["class"]) == (site, "real", index)]
        if mine:
            found[name if named else str(index)] = (_median([p["x"] for p in mine]), _median([p["y"] for p in mine]))
    return found


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def adapters(run: Run) -> Section | None:
    """Return the section on each site's fine-tuning of the generator."""
    rows = []
    recognised = {key: value for record in run.rounds for key, value in record["aggregate"].items() if "recognised/" in key}
    spent = {m["site"]: m.get("seconds") for m in run.messages if (m["stage"], m["direction"]) == ("adapt", "up")}
    for record in run.rounds:
        if record["stage"] != "adapt":
            continue
        for site, metrics in sorted(record["train"].items()):
            rows.append(
                cells(
                    site,
                    _share(metrics.get("recognised", recognised.get(f"recognised/{site}"))),
                    size(record["bytes_up"].get(site)),
                    duration(metrics.get("seconds", spent.get(site))),
                    number(metrics.get("steps"), 0),
                    number(metrics.get("first_loss"), 3),
                    number(metrics.get("loss"), 3),
                )
            )
    if not rows:
        return None
    how = (
        "Each site fine-tunes a small adapter of the frozen generator on its own images and sends only that. “Recognised” "
        "is the share of its samples that a classifier assigns to the requested class."
    )
    header = ("site", "recognised", "sent", "time", "steps", "first loss", "last loss")
    return Section("adapters", "Adapters", how, tables=[without_gaps("Adapters by site", header, rows)])


def _share(value: float | None) -> Cell:
    if value is None:
        return Cell(number(None))
    return Cell(f"{number(100 * value, 0)} %", bar=min(max(value, 0.0), 1.0))


def samples(run: Run) -> Section | None:
    """Return the section on the synthetic images that the filter kept."""
    record = next((record["aggregate"] for record in run.rounds if record["aggregate"].get("kept") is not None), None)
    if record is None:
        return None
    rows = []
    for site in sorted(key.removeprefix("kept/") for key in record if key.startswith("kept/")):
        kept, drawn = record[f"kept/{site}"], record.get(f"samples/{site}")
        wrong, aside = record.get(f"contradicted/{site}"), f"set_aside/{site}" in record
        shown = "set aside" if aside else "in dispute" if record.get("disputed") and wrong else number(None)
        rows.append((*_kept(site, kept, drawn, record.get(f"recognised/{site}")), *cells(_share(wrong), shown)))
    whole = _kept("all sites", record["kept"], record.get("samples"), record.get("recognised"))
    rows.append((*whole, *cells(number(None), number(None))))
    how = (
        "The server samples images from every adapter and drops those that a check does not assign to the requested "
        "class. The first classifier is trained on the others. If many are dropped, the adapter may need more steps. "
        "“Contradicted” is the share of a site's classes that most other sites' samples show as one other class, shown "
        "if a site was set aside or the adapters are in dispute. Samples of a site that was set aside are not used."
    )
    header = ("adapter of", "kept, share", "kept", "dropped", "drawn", "recognised", "contradicted", "verdict")
    return Section("filter", "Synthetic images kept and dropped", how, tables=[without_gaps("Filter", header, rows)])


def _kept(name: str, kept: float, drawn: float | None, recognised: float | None) -> tuple[Cell, ...]:
    dropped = None if drawn is None else drawn - kept
    share = None if not drawn else kept / drawn
    return cells(name, _share(share), *(number(value, 0) for value in (kept, dropped, drawn)), _share(recognised))


SELECTOR = (
    ("selector_share_recent", "Share of the newer teacher", "share", "selector-share"),
    ("selector_entropy", "Entropy of the choice", "entropy", "selector-entropy"),
    ("selector_temperature", "Temperature", "temperature", "selector-temperature"),
)


def selector(run: Run) -> Section | None:
    """Return the section on the choice of dynamic self-distillation between the last two personal models."""
    records = [record for record in run.rounds if any("selector_share_recent" in m for m in record["train"].values())]
    if not records:
        return None
    ticks = [str(record["number"] + 1) for record in records]
    figures = []
    rows: list[list[str]] = [[tick] for tick in ticks]
    header = ["round"]
    for key, title, unit, name in SELECTOR:
        series = {site: [record["train"].get(site, {}).get(key) for record in records] for site in run.sites}
        series = {site: values for site, values in series.items() if any(value is not None for value in values)}
        if not series:
            continue
        middle = [mean(column) for column in zip(*series.values(), strict=True)]
        alike = all(values == middle for values in series.values())
        alt = f"{title}: mean over sites from {number(middle[0], 2)} in round {ticks[0]} to {number(middle[-1], 2)}."
        svg = plots.lines(name, alt, ticks, {} if alike else series, unit=unit, bold=("all" if alike else "mean", middle))
        figures.append(Figure(title, svg, alt))
        header.append(title.lower())
        for row, value in zip(rows, middle, strict=True):
            row.append(number(value, 3))
    how = (
        "From the second round on, a site’s personal model learns from its own last two versions; for every image the "
        "selector chooses which. A share near one half with high entropy means that it has no preference; the temperature "
        "falls on a schedule, which makes the choice harder."
    )
    table = Table("Selector, mean over sites", tuple(header), tuple(cells(*row) for row in rows), folded=True)
    return Section("selector", "The selector of teachers", how, figures, tables=[table])


def gate(run: Run) -> Section | None:
    """Return the section on the share of the server's fine-tuning that validation kept; None without validation."""
    records = [record for record in run.rounds if "gate_kept" in record["aggregate"]]
    measures = [record["aggregate"] for record in records]
    before, after, whole = ([m.get(f"validation_{when}") for m in measures] for when in ("before", "after", "tuned"))
    if not any(value is not None for value in before):
        return None
    ticks = [str(record["number"] + 1) for record in records]
    kept = [bool(m["gate_kept"]) for m in measures]
    rows = [
        cells(
            tick,
            _decision(keep, m.get("gate_strength")),
            signed(end - start) if start is not None and end is not None else number(None),
            number(start),
            number(end),
            number(tuned),
        )
        for tick, start, end, tuned, keep, m in zip(ticks, before, after, whole, kept, measures, strict=True)
    ]
    alt = f"The server's fine-tuning by round: kept, whole or in part, in {sum(kept)} of {len(kept)} rounds."
    # If the step was undone, the plot shows its effect before that.
    ends = [end if keep or tuned is None else tuned for end, tuned, keep in zip(after, whole, kept, strict=True)]
    svg = plots.decisions("gate", alt, ticks, before, ends, kept)
    key = (("―", "before"), ("●", "after, kept"), ("○", "after, undone"))
    figure = Figure("Validation accuracy before and after", svg, alt, key)
    how = (
        "After a round the server fine-tunes the global model on synthetic images. The gate lets through what does not "
        f"lower the sites’ validation accuracy, whole or in part: {sum(kept)} of {len(kept)} rounds."
    )
    header = ("round", "decision", "change", "before, %", "after, %", "if whole, %")
    tables = [without_gaps("Decisions of the gate", header, rows, words=("decision",))]
    own = {
        site: m["personal_strength"]
        for record in run.rounds
        for site, m in sorted(record["train"].items())
        if m.get("personal_strength") is not None
    }
    if own:
        how += " At the end each site lets its own validation decide the same of its last personal step."
        decisions = tuple(cells(site, _decision(share > 0, share)) for site, share in own.items())
        tables.append(Table("The sites’ last personal steps", ("site", "decision"), decisions, words=("decision",)))
    return Section("gate", "The do-no-harm gate", how, [figure], tables=tables)


def _decision(kept: bool, strength: float | None) -> str:
    if not kept:
        return "✗ undone"
    return "✓ kept" if strength is None or strength >= 1 else f"✓ kept {number(100 * strength, 0)} %"


WAYS = {"up": "site → server", "down": "server → site"}


def communication(run: Run) -> Section | None:
    """Return the section on bytes by stage, direction and site, counted at the codec."""
    if not run.messages:
        return None
    count = max(len(run.sites), 1)
    by_stage = {stage: [_bytes(run, way, stage=stage) / count for way in WAYS] for stage in _order(run, run.messages)}
    by_site = {site: [_bytes(run, way, site=site) for way in WAYS] for site in run.sites}
    rows = []
    for stage in by_stage:
        for way, name in WAYS.items():
            mine = [m for m in run.messages if (m["stage"], m["direction"]) == (stage, way)]
            for kind in sorted({m["kind"] for m in mine}):
                sizes = [m["bytes"] for m in mine if m["kind"] == kind]
                rows.append(cells(stage, name, kind, f"{len(sizes):,}", size(fmean(sizes)), size(sum(sizes))))
    sites = tuple(cells(site, *(size(value) for value in values)) for site, values in by_site.items())
    how = (
        "Every message that crossed the wire, counted as it was encoded; what is not listed here was not sent. "
        "The plot is for one site, over all rounds."
    )
    header = ("stage", "direction", "message", "sent", "each, mean", "all sites")
    tables = [
        Table("Messages by kind", header, tuple(rows), words=("direction", "message")),
        Table("By site, all rounds", ("site", "up", "down"), sites, folded=True),
    ]
    return Section("communication", "Communication", how, [_traffic(by_stage)], tables=tables)


def _traffic(values: Mapping[str, Sequence[float]]) -> Figure:
    title = "By stage, mean per site"
    scale, unit = (1e6, "MB") if max((sum(pair) for pair in values.values()), default=0) >= 1e5 else (1e3, "kB")
    parts = {way: [pair[place] / scale for pair in values.values()] for place, way in enumerate(WAYS)}
    labels = [f"{number(up / scale, 2)} + {number(down / scale, 2)}" for up, down in values.values()]
    alt = f"{title}, up + down in {unit}: " + "; ".join(f"{n} {t}" for n, t in zip(values, labels, strict=True)) + "."
    svg = plots.bars("traffic", alt, list(values), parts, labels, unit=f"{unit}, up + down")
    return Figure(title, svg, alt, key=(("■", "up"), ("□", "down")))


def _bytes(run: Run, way: str, **named: str) -> int:
    return sum(
        message["bytes"]
        for message in run.messages
        if message["direction"] == way and all(message[key] == value for key, value in named.items())
    )


def _order(run: Run, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the stages of `records`, in the order of the rounds."""
    first = [record["stage"] for record in (*run.rounds, *records)]
    return sorted({record["stage"] for record in records}, key=first.index)


def time_and_memory(run: Run) -> Section | None:
    """Return the section on seconds and peak memory by stage."""
    if not run.stages:
        return None
    stages = _order(run, run.stages)
    mine = {stage: [record for record in run.stages if record["stage"] == stage] for stage in stages}
    seconds = {stage: sum(record["seconds"] for record in records) for stage, records in mine.items()}
    peaks = {
        stage: max((r["peak_memory_mb"] for r in records if "peak_memory_mb" in r), default=None)
        for stage, records in mine.items()
    }
    alt = "Time by stage: " + "; ".join(f"{stage} {duration(spent)}" for stage, spent in seconds.items()) + "."
    labels = [duration(spent) for spent in seconds.values()]
    svg = plots.bars("time", alt, stages, {"seconds": list(seconds.values())}, labels, unit="seconds")
    rows = tuple(
        cells(stage, f"{len(records):,}", duration(seconds[stage]), duration(seconds[stage] / len(records)),
              memory(peaks[stage]))
        for stage, records in mine.items()
    )  # fmt: skip
    how = (
        "Wall-clock time of each stage over all its rounds, with evaluation, and the most memory that it held. "
        "Sites that worked one after another here would work at the same time in a real federation."
    )
    header = ("stage", "times", "in all", "each, mean", "peak memory")
    table = Table("Time and memory by stage", header, rows)
    return Section("time", "Time and memory", how, [Figure("Time by stage", svg, alt)], tables=[table])


def provenance(run: Run) -> Section:
    """Return the section with the resolved configuration and all hashes."""
    named = [
        ("data", run.summary["data_sha256"]),
        ("generator base", run.summary.get("base_sha256")),
        ("history of results", run.summary["history_sha256"]),
        *((f"model: {name}", value) for name, value in sorted((run.summary.get("models_sha256") or {}).items())),
    ]
    rows = tuple(cells(name, value) for name, value in named if value)
    how = (
        "Everything needed to repeat this run. “warmfed verify” runs it again and compares: the same configuration, seed "
        "and data give the same history, bit for bit, on the same kind of machine."
    )
    table = Table("Hashes in full (SHA-256)", ("of", "SHA-256"), rows, folded=True, words=("SHA-256",))
    return Section("configuration", "Configuration and hashes", how, tables=[table], text=run.config)
