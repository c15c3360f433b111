"""Sections on a diffusion model: quality of its samples by round and by megabyte, and the server's corrections."""

from collections.abc import Mapping
from typing import Any

from . import plots
from .parts import Figure, Section, Table, cells, number, percent, without_gaps
from .record import Run

SCORES = (
    ("fid", "Fréchet distance", 2, "lower is better; what test images have against training images is the floor"),
    ("kid", "kernel distance", 4, "lower is better"),
    ("precision", "precision, %", 1, "samples that lie among training images"),
    ("recall", "recall, %", 1, "training images that lie among samples"),
    ("density", "density, %", 1, "how many training images are about a sample; 100 as many as about one of their own"),
    ("coverage", "coverage, %", 1, "training images that have a sample as a neighbour"),
    ("cas", "CAS, %", 1, "classification accuracy score: test accuracy of a classifier that was trained on samples alone"),
    (
        "memorization_rate",
        "memorization rate, %",
        1,
        "samples nearer to a training image than 95 % of the test images are; about 5 if none is copied",
    ),
)


def _samples(quality: Mapping[str, Any]) -> str:
    own = quality.get("models", 1)
    return f"{quality['samples']:,} samples" + (f" of {own} sites' own models" if own > 1 else "")


def quality_table(quality: Mapping[str, Any]) -> Table:
    """Return the table of all scores with their meanings."""
    rows = [cells(name, number(quality[key], digits), what) for key, name, digits, what in SCORES if key in quality]
    if "floor_fid" in quality:
        rows.insert(1, cells("floor of it", number(quality["floor_fid"], 2), "test against training images"))
    title = f"quality of {_samples(quality)}" if quality else "no samples were measured"
    return Table(title, ("score", "value", "what it is"), tuple(rows), words=("what it is",))


def tiles(run: Run) -> list[dict[str, Any]]:
    """Return the main numbers, as `accuracy.tiles` does."""
    quality = run.summary.get("quality")
    if not quality:
        return []
    what = f"{_samples(quality)} against all training images, last round"
    facts = [("floor (test images)", number(quality["floor_fid"], 2)), ("kernel distance", number(quality["kid"], 4))]
    shown = [
        {
            "kind": "global",
            "title": "Fréchet distance",
            "what": what,
            "value": number(quality["fid"], 2),
            "unit": "",
            "facts": facts,
        }
    ]
    if "cas" in quality:
        facts = [(name, percent(quality[name])) for name in ("precision", "recall", "coverage")]
        what = "a classifier trained on samples alone, on real test images"
        shown.append(
            {
                "kind": "personal",
                "title": "Classification accuracy score",
                "what": what,
                "value": number(quality["cas"]),
                "facts": facts,
            }
        )
    return shown


def sections(run: Run) -> tuple[Section | None, ...]:
    """Return the sections that replace those on accuracy."""
    return _quality(run), _loss(run), _corrections(run)


def _quality(run: Run) -> Section | None:
    measured = [record for record in run.rounds if "quality" in record]
    if not measured:
        return None
    figures = []
    sent = {
        record["step"]: sum(sum(r["bytes_up"].values()) for r in run.rounds if r["step"] <= record["step"])
        for record in measured
    }
    if len(measured) > 1:
        ticks = [_label(record) for record in measured]
        for key, name in (("fid", "Fréchet distance"), ("cas", "CAS")):
            values = [record["quality"].get(key) for record in measured]
            if any(value is None for value in values):
                continue
            series = {"samples": values}
            if key == "fid":
                series["floor"] = [record["quality"]["floor_fid"] for record in measured]
            alt = (
                f"{name} by round: {', '.join(f'{tick} {number(value, 2)}' for tick, value in zip(ticks, values, strict=True))}"
            )
            unit = name if key == "fid" else "test accuracy, %"
            figures.append(
                Figure(f"{name} by round".capitalize(), plots.lines(f"quality-{key}", alt, ticks, series, unit=unit), alt)
            )
        megabytes = [sent[record["step"]] / 1e6 for record in measured]
        fid = [record["quality"]["fid"] for record in measured]
        ticks = [number(value) for value in megabytes]
        alt = "Fréchet distance by megabytes sent: " + ", ".join(
            f"{x} MB {number(y, 2)}" for x, y in zip(ticks, fid, strict=True)
        )
        svg = plots.lines(
            "quality-bytes", alt, ticks, {"samples": fid}, unit="Fréchet distance", xlabel="sent by all sites so far, MB"
        )
        figures.append(Figure("Fréchet distance by megabytes", svg, alt))
    last = measured[-1]["quality"]
    how = (
        f"{last['samples']:,} samples, classes as frequent as in the data, against all training images, in the features of a "
        f"network that is not part of the run (SHA-256 {last['features'][:12]}). Scores are comparable only for one choice "
        "of features and one number of samples."
    )
    return Section("quality", "Quality of the samples", how, figures, tables=[quality_table(last)])


def _label(record: Mapping[str, Any]) -> str:
    return str(record["number"] + 1) if record["stage"] == "train" else str(record["stage"])


def adapters(run: Run) -> Section | None:
    """Return the section on the samples of each site's adapter."""
    if run.report_images is None or not run.report_images.adapters:
        return None
    keys = (
        *((key, name, digits) for key, name, digits, _ in SCORES),
        *(("diversity", "diversity, %", 1), ("nearest", "nearest, %", 1)),
    )
    shown = [
        (key, name, digits)
        for key, name, digits in keys
        if any(key in scores for scores in run.report_images.adapters.values())
    ]
    rows = []
    for site, scores in sorted(run.report_images.adapters.items()):
        texts = [number(scores.get(key), digits) for key, _, digits in shown]
        texts.insert(1, number(scores.get("floor_fid"), 2))
        rows.append(cells(site, number(scores.get("samples"), 0), *texts))
    names = [name for _, name, _ in shown]
    names.insert(1, "its floor")
    how = (
        "All samples of each adapter against the training images of its own site, in the features of one network "
        f"(SHA-256 {run.report_images.features_sha256[:12]}); the floor is what the site’s test images have. "
        "Diversity: how far samples of a class lie apart, in percent of real images. Nearest: how near the closest of all "
        "samples comes to a training image, in percent of what test images do in the median; 0 would be a copy."
    )
    table = without_gaps("Quality of each adapter", ("adapter of", "samples", *names), rows)
    return Section("adapter-quality", "Quality of the adapters", how, tables=[table])


def _loss(run: Run) -> Section | None:
    shown = [record for record in run.rounds if (record.get("union") or {}).get("global")]
    if not shown:
        return None
    series: dict[str, list[float | None]] = {
        site: [(record["global"].get(site) or {"test": {"loss": None}})["test"]["loss"] for record in shown]
        for site in run.sites
    }
    bold = [record["union"]["global"]["loss"] for record in shown]
    ticks = [_label(record) for record in shown]
    alt = f"Denoising loss on test images by round, all sites: {number(bold[0], 4)} to {number(bold[-1], 4)}."
    figure = Figure(
        "Global model by round", plots.lines("loss", alt, ticks, series, unit="loss", bold=("all sites", bold)), alt
    )
    how = "Mean squared error of the prediction on test images, with the same noise in every round; lower is better."
    return Section("loss", "Denoising loss by site", how, [figure])


def _corrections(run: Run) -> Section | None:
    """Return the section on slow training and the server's corrections."""
    shown = [record for record in run.rounds if "auxiliary_loss" in record["aggregate"]]
    if not shown:
        return None
    ticks = [_label(record) for record in shown]
    values = [record["aggregate"]["auxiliary_loss"] for record in shown]
    fired = [tick for tick, record in zip(ticks, shown, strict=True) if record["aggregate"].get("corrected")]
    alt = f"Loss of the mean on held-out auxiliary samples by round: {number(values[0], 4)} to {number(values[-1], 4)}."
    svg = plots.lines("auxiliary", alt, ticks, {"before correction": values}, unit="loss")
    rows = tuple(
        cells(
            tick,
            number(record["aggregate"]["auxiliary_loss"], 4),
            "yes" if record["aggregate"].get("slow") else "no",
            "yes" if record["aggregate"].get("corrected") else "no",
            number(record["aggregate"].get("correction_steps"), 0),
        )
        for tick, record in zip(ticks, shown, strict=True)
    )
    header = ("round", "auxiliary loss", "slow", "corrected", "server steps")
    table = Table("The server\u2019s decisions", header, rows, words=("slow", "corrected"))
    when = "after every round" if len(fired) == len(shown) else f"after round {', '.join(fired)}" if fired else "never"
    how = f"The loss of the mean on auxiliary samples that nothing is trained on. The server corrected it {when}."
    return Section("corrections", "Corrections on the auxiliary set", how, [Figure("Auxiliary loss", svg, alt)], tables=[table])
