"""The report: shown and omitted sections, and errors for damaged files."""

import base64
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_folders import (
    COMPARE,
    LEDGER,
    SUMMARY,
    WARMFED,
    comparison_folder,
    judged,
    one_round,
    png,
    record,
    run_folder,
)

from warmfed import report
from warmfed.report import parts, sections
from warmfed.report.accuracy import milestones
from warmfed.report.plots import _apart, features, lines, short
from warmfed.report.record import DRAWN, read_run
from warmfed.utils.errors import InputError

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Parser of a page: it fails on tags that do not nest, and keeps ids, headings, links and table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values[key] or "" for key in ("href", "src", "xlink:href") if key in values]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open if tag in VOID else self.open[:-1]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()
        if self.open[-1:] == ["h2"]:
            self.headings[-1] += data


@pytest.fixture(scope="module")
def warmfed_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the run that has everything, written once for the tests that only look at it."""
    return report.write(run_folder(tmp_path_factory.mktemp("warmfed")))


def page(folder: Path) -> Page:
    return Page(report.write(folder).read_text())


def test_a_warmfed_run_has_every_section(warmfed_page: Path) -> None:
    assert warmfed_page.name == "report.html"
    assert Page(warmfed_page.read_text()).headings == [
        "Global model",
        "Personal models",
        "Accuracy by round and by site",
        "Final numbers by site",
        "Real beside synthetic images",
        "Real and synthetic features",
        "Adapters",
        "Synthetic images kept and dropped",
        "The selector of teachers",
        "The do-no-harm gate",
        "Communication",
        "Time and memory",
        "Configuration and hashes",
    ]


def test_a_plain_run_has_only_what_it_did(tmp_path: Path) -> None:
    rounds = [record(0, "train", 0, **judged(0.0) | {"personal": {}})]
    folder = run_folder(tmp_path, rounds, [LEDGER[-1]], images=False, rounds=1, personal=None, one_shot=None)

    assert page(folder).headings == [
        "Global model",
        "Accuracy by round and by site",
        "Final numbers by site",
        "Time and memory",
        "Configuration and hashes",
    ]


def test_the_numbers_are_those_of_the_records(warmfed_page: Path) -> None:
    rows = Page(warmfed_page.read_text()).rows

    assert ["warm", "75.0", "80.0", "70.0"] in rows  # round, all sites, ink, street
    assert ["3", "91.5", "93.0", "90.0"] in rows  # personal: mean, ink, street
    assert ["end", "92.5", "94.0", "91.0"] in rows
    assert ["street", "80.0", "91.0", "79.0", "90.0", "78.0", "89.0", "3.5", "3.5", "225", "180"] in rows
    assert ["ink", "75 %", "0.20 MB", "12.0 s", "40", "0.900", "0.250"] in rows  # recognised: as the server found
    assert ["ink", "75 %", "30", "10", "40", "75 %"] in rows  # kept, dropped, drawn, recognised
    assert ["all sites", "62 %", "50", "30", "80", "–"] in rows
    assert ["1", "✓ kept 50 %", "+1.0", "84.0", "85.0", "83.5"] in rows
    assert ["2", "✗ undone", "0.0", "84.0", "84.0", "83.5"] in rows
    assert ["3", "✓ kept", "+2.0", "84.0", "86.0", "83.5"] in rows
    assert ["3", "0.625", "0.600", "0.900"] in rows
    assert ["adapt", "site → server", "WarmFed.Adapter", "2", "0.20 MB", "0.40 MB"] in rows
    assert ["warm", "1", "1 min 10 s", "1 min 10 s", "1.10 GB"] in rows


def test_the_headline_is_the_last_round_and_names_one_shot(warmfed_page: Path) -> None:
    text = warmfed_page.read_text()

    assert re.findall(r'class="value">([\d.]+)', text) == ["85.0", "92.5"]
    assert "<dt>after one shot</dt><dd>75.0 %</dd>" in text
    assert "seed 7" in text
    for digest in ("da", "ba", "15"):
        assert digest * 32 in text


def test_a_page_is_self_contained_and_inert(warmfed_page: Path) -> None:
    text = warmfed_page.read_text()
    read = Page(text)

    assert all(link.startswith(("#", "data:")) for link in read.links)
    assert "script" not in read.tags
    assert "default-src 'none'" in text
    assert "url(http" not in text
    assert len(text.encode()) < 2_000_000


def test_ids_are_unique_and_every_reference_has_its_target(warmfed_page: Path) -> None:
    text = warmfed_page.read_text()
    read = Page(text)

    assert len(read.ids) == len(set(read.ids))
    references = re.findall(r"url\(#([\w-]+)\)", text) + [link[1:] for link in read.links if link.startswith("#")]
    assert set(references) <= set(read.ids)


def test_plots_take_their_colours_from_the_page(warmfed_page: Path) -> None:
    text = warmfed_page.read_text()
    plots = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))

    assert "#0000" not in plots
    used = set(re.findall(r"var\(--(\w+)\)", plots))
    assert {"ink", "s0", "s1"} <= used
    assert all(f"--{name}:" in text for name in used)


HOSTILE = "</svg><script>alert(1)</script>\"'& $x$ --> 医院"


def test_every_value_is_escaped(tmp_path: Path) -> None:
    renamed = json.loads(json.dumps(WARMFED).replace('"ink"', json.dumps(HOSTILE)))
    folder = run_folder(tmp_path, renamed, [], (HOSTILE, "one"), algorithm=HOSTILE, federation=HOSTILE)
    (folder / "summary.json").write_text((folder / "summary.json").read_text().replace('"ink"', json.dumps(HOSTILE)))
    report_images = folder / "report_images" / "report_images.json"
    report_images.write_text(report_images.read_text().replace('"ink"', json.dumps(HOSTILE)))
    (folder / "config.toml").write_text(f"# {HOSTILE}\n")

    read = page(folder)

    assert "script" not in read.tags
    assert len(read.headings) == 11  # all but what the ledger tells
    assert any(HOSTILE in cell for row in read.rows for cell in row)


def test_the_same_run_gives_the_same_page(warmfed_page: Path, tmp_path: Path) -> None:
    assert report.write(run_folder(tmp_path)).read_bytes() == warmfed_page.read_bytes()


def test_many_sites_and_one_shot_make_a_page(tmp_path: Path) -> None:
    names = [f"clinic-{place:02d}" for place in range(30)]
    accuracies = {name: 60.0 + place for place, name in enumerate(names)}
    both = {
        kind: {name: {"test": {"accuracy": value}} for name, value in accuracies.items()} for kind in ("global", "personal")
    }
    sites = {name: {"train": 9, "validation": 9, "test": 9} for name in names}
    folder = run_folder(tmp_path, [record(0, "warm", 0, **both)], images=False, rounds=0, sites=sites)

    text = report.write(folder).read_text()

    assert "one-shot · 30 sites" in text
    assert "the lowest 24 of 30" in text
    assert ["clinic-29", "89.0", "89.0", "9", "9"] in Page(text).rows


def test_noisy_pictures_are_compressed(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    folder = run_folder(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (640, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "report_images" / "real-ink.png")

    section = sections.pictures(read_run(folder))

    assert section is not None
    _, uri, across = section.pictures[0].columns[0]
    assert uri.startswith("data:image/webp;")
    assert len(uri) < 500_000
    assert across == 2  # 800 x 640 pixels, two classes: cells of 320 pixels


def test_values_that_are_not_finite_are_said_not_drawn(tmp_path: Path) -> None:
    rounds = json.loads(json.dumps(WARMFED).replace("0.625", "NaN"))

    section = sections.selector(read_run(run_folder(tmp_path, rounds)))

    assert section is not None
    assert [cell.text for cell in section.tables[0].rows[-1]] == ["3", "not finite", "0.600", "0.900"]


def damage_summary(folder: Path) -> None:
    (folder / "summary.json").write_text('{"algorithm": ')


def remove_key(folder: Path) -> None:
    (folder / "summary.json").write_text(json.dumps({key: value for key, value in SUMMARY.items() if key != "seed"}))


def wrong_type(folder: Path) -> None:
    rounds = folder / "rounds.jsonl"
    rounds.write_text(rounds.read_text().replace('"number": 1', '"number": "one"'))


def wrong_picture(folder: Path) -> None:
    (folder / "report_images" / "real-ink.png").write_bytes(b"<svg/>")


def cut_picture(folder: Path) -> None:
    (folder / "report_images" / "real-ink.png").write_bytes(png(9)[:-40])


def other_picture(folder: Path) -> None:
    report_images = folder / "report_images" / "report_images.json"
    report_images.write_text(report_images.read_text().replace("real-ink.png", "../secret.png"))


def wrong_class(folder: Path) -> None:
    report_images = folder / "report_images" / "report_images.json"
    report_images.write_text(report_images.read_text().replace('"class": 1', '"class": 2'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "summary.json").unlink(), r"summary\.json does not exist.*warmfed resume"),
        (damage_summary, r"summary at .*summary\.json is damaged"),
        (remove_key, r"summary\.json has no 'seed'"),
        (lambda folder: (folder / "summary.json").write_text("[]"), r"summary\.json: expected an object; found '\[\]'"),
        (wrong_type, r"rounds\.jsonl line 5: number: expected a whole number; found 'one'"),
        (lambda folder: (folder / "rounds.jsonl").write_text(""), r"rounds\.jsonl is empty"),
        (lambda folder: (folder / "ledger.jsonl").unlink(), r"^cannot read the run's ledger"),
        (lambda folder: (folder / "config.toml").unlink(), r"^cannot read the run's configuration"),
        (lambda folder: (folder / "report_images" / "real-ink.png").unlink(), r"images of site 'ink'"),
        (wrong_picture, r"real images of ink .*do not decode as PNG"),
        (cut_picture, r"real images of ink .*do not decode as PNG"),
        (other_picture, r"expected the name of a PNG file beside it; found '\.\./secret\.png'"),
        (wrong_class, r"features\[1\]: expected a class from 0 to 1; found 2"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    folder = run_folder(tmp_path)
    (folder / "report.html").write_text("the earlier report")
    damage(folder)

    with pytest.raises(InputError, match=said):
        report.write(folder)

    assert (folder / "report.html").read_text() == "the earlier report"


def test_what_is_no_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"compare\.json does not exist"):
        report.write_comparison(tmp_path)


def test_the_table_marks_the_winner_of_every_column() -> None:
    table = report.table(COMPARE)

    assert table.header == (
        "algorithm", "global, %", "global, worst site", "personal, %", "personal, worst site", "upload per site", "time",
    )  # fmt: skip
    assert [row[0].text for row in table.rows] == ["fedavg", "warmfed", "ditto", "centralized (reference)"]
    assert table.rows[1][1] == parts.Cell("96.0 ± 0.5", best=True)
    assert table.rows[3][1] == parts.Cell("97.0 ± 0.5", best=False)  # a reference wins nothing
    cheapest = [[cell.best for cell in row[5:]] for row in table.rows]
    assert cheapest == [[True, True], [False, False], [True, True], [False, False]]


def test_columns_without_values_are_left_out_and_one_alone_wins_nothing() -> None:
    table = report.table(COMPARE | {"rows": [COMPARE["rows"][1]]})

    assert table.header == ("algorithm", "global, %", "global, worst site", "upload per site", "time")
    assert not any(cell.best for cell in table.rows[0])


def test_markdown_has_both_tables() -> None:
    text = report.markdown(COMPARE)

    assert text.splitlines()[:4] == [
        "| algorithm | global, % | global, worst site | personal, % | personal, worst site | upload per site | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| fedavg | 93.0 ± 0.5 | 91.0 | – | – | **0.90 MB** | **30.0 s** |",
        "| warmfed | **96.0 ± 0.5** | **94.0** | **97.5 ± 0.5** | **95.5** | 1.20 MB | 2 min 30 s |",
    ]
    assert text.splitlines()[-1] == "| global | warmfed − fedavg | +3.00 | < 0.001 | significant |"


def test_uneven_classes_bring_a_table_that_weighs_them_alike() -> None:
    even = {"personal_mean": 90.0, "personal_balanced_accuracy_mean": 89.5, "personal_macro_f1_mean": 88.0}
    uneven = {**even, "personal_balanced_accuracy_mean": 60.0}

    def second(*changes: dict[str, float]) -> list[str]:
        rows = [{**each, **change} for each, change in zip(COMPARE["rows"][1:3], changes, strict=True)]
        return report.markdown(COMPARE | {"rows": rows, "tests": []}).split("\n\n")[2:]

    assert second(even, even) == []
    title, table = second(even, uneven)
    assert title == "## 5 rounds: every class weighs the same, means over the sites"
    assert table.splitlines()[2:] == ["| fedavg | **89.5** | **88.0** |", "| warmfed | 60.0 | **88.0** |"]


def test_only_rows_of_equal_length_compete() -> None:
    short = {**COMPARE["rows"][1], "rounds": 1, "global_mean": 50.0}

    text = report.markdown(
        COMPARE | {"rows": [*COMPARE["rows"], short, {**short, "algorithm": "fedprox", "global_mean": 49.0}]}
    )

    assert "## 1 round, 2 seeds: mean ± standard deviation at the last round" in text
    assert "| fedavg | **50.0 ± 0.5** |" in text
    assert "| warmfed | **96.0 ± 0.5** |" in text


def test_a_comparison_page_has_the_tables_and_the_plots(tmp_path: Path) -> None:
    text = report.write_comparison(comparison_folder(tmp_path)).read_text()
    read = Page(text)

    assert read.headings == [
        "Best global model: warmfed",
        "Best personal models: warmfed",
        "Results",
        "Accuracy against megabytes",
        "Accuracy against rounds",
    ]
    assert ["warmfed", "★96.0 ± 0.5", "★94.0", "★97.5 ± 0.5", "★95.5", "1.20 MB", "2 min 30 s"] in read.rows
    assert len(read.ids) == len(set(read.ids))
    assert "centralized (reference)</dt><dd>97.0 %" in text


def test_a_comparison_of_diffusion_models_shows_what_they_draw(tmp_path: Path) -> None:
    """Of the arms whose run folders are known and hold a grid; the page has that grid as it is."""
    folder = comparison_folder(tmp_path, measure="loss")
    assert "What they draw" not in Page(report.write_comparison(folder).read_text()).headings

    report_images = folder / "warmfed-0" / "report_images"
    (report_images / "drawn.png").write_bytes(png(200))
    content = json.loads((report_images / "report_images.json").read_text())
    content["sites"] = {DRAWN: {"synthetic": "drawn.png"}, **content["sites"]}
    (report_images / "report_images.json").write_text(json.dumps(content))
    text = report.write_comparison(folder).read_text()
    assert Page(text).headings == ["Results", "What they draw"]
    assert base64.b64encode(png(200)).decode() in text
    assert "drawn images of warmfed, one row per class: zero, one" in text
    (report_images / "drawn.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match="images drawn by warmfed"):
        report.write_comparison(folder)


def test_a_round_goes_by_its_number_and_its_last_stage() -> None:
    found = milestones(WARMFED)

    assert {label: record["step"] for label, record in found.items()} == {"warm": 1, "1": 3, "2": 5, "3": 7, "end": 8}
    assert list(found) == ["warm", "1", "2", "3", "end"]


def test_the_sites_own_gates_stand_beside_the_servers(tmp_path: Path) -> None:
    shares = {"ink": {"personal_strength": 0.5}, "street": {"personal_strength": 0.0}}
    records = [*one_round(0, 0, 0.0, 1.0, None), record(2, "personalize", 0, train=shares, **judged(0.0))]
    section = sections.gate(read_run(run_folder(tmp_path, records, images=False)))
    assert section is not None
    assert [[cell.text for cell in row] for row in section.tables[-1].rows] == [["ink", "✓ kept 50 %"], ["street", "✗ undone"]]


def test_a_gate_that_was_off_is_not_shown(tmp_path: Path) -> None:
    ungated = [record(0, "train", 0, aggregate={"gate_kept": 1.0, "gate_strength": 1.0}, **judged(0.0))]

    assert sections.gate(read_run(run_folder(tmp_path, ungated, images=False))) is None


def test_names_in_a_map_make_way_for_one_another() -> None:
    names = {"left": (0.0, 0.0), "here": (5.0, 5.0), "there": (5.0, 5.0), "nowhere": (5.0, 5.1)}

    svg = features("key", "A map.", [(0.0, 0.0), (10.0, 10.0)], [(0.0, 0.0)], [(5.0, 5.0)], names, 0)

    places = re.findall(r'x="([\d.]+)" y="([\d.]+)">(\w+)</text>', svg)
    assert [name for _, _, name in places] == ["left", "here", "there", "nowhere"]
    heights = sorted(float(y) for _, y, _ in places)
    assert all(lower - upper > 10 for upper, lower in itertools.pairwise(heights))


def test_labels_are_moved_apart_and_stay_inside() -> None:
    assert _apart([5.0, 5.0, 1.0], 2.0, 0.0, 10.0) == [5.0, 7.0, 1.0]
    assert _apart([9.0, 9.5, 9.9], 1.0, 0.0, 10.0) == [8.0, 9.0, 10.0]


def test_long_names_keep_both_ends() -> None:
    assert short("hospital-of-the-holy-spirit-03") == "hospita…pirit-03"
    assert short("street") == "street"


def test_a_plot_leaves_gaps_and_says_what_it_shows() -> None:
    svg = lines("key", "Two <lines>.", ["1", "2", "3"], {"a": [1.0, None, 3.0], "b": [None, None, None]})

    assert 'aria-label="Two &lt;lines&gt;."' in svg
    assert ">a</text>" in svg
    assert ">b</text>" not in svg


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (parts.percent(91.25), "91.2 %"),
        (parts.percent(None), "–"),
        (parts.signed(-1.26), "−1.3"),
        (parts.signed(0.4), "+0.4"),
        (parts.size(420), "0.4 kB"),
        (parts.size(212_345), "0.21 MB"),
        (parts.size(0), "0 B"),
        (parts.duration(59.96), "1 min 00 s"),
        (parts.duration(161.4), "2 min 41 s"),
        (parts.duration(7260), "2 h 01 min"),
        (parts.memory(1240.0), "1.24 GB"),
        (parts.number(float("inf")), "not finite"),
    ],
)
def test_numbers_are_written_for_people(written: str, text: str) -> None:
    assert written == text


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_series_stand_out_in_light_and_dark() -> None:
    style = (Path(report.__file__).parent / "templates" / "style.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]

    assert len(themes) == 2
    for theme in themes:
        for name in ("ink", "muted", "accent", *(f"s{place}" for place in range(8))):
            for ground in ("card", "page"):
                low, high = sorted((luminance(theme[name]), luminance(theme[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)  # WCAG 2 AA for text


def test_the_report_needs_no_torch() -> None:
    code = "import sys, warmfed.report; print(sorted({'torch', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
