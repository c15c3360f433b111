"""The report in a browser, at desktop and phone widths: nothing is cut off, and the console is empty."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_folders import LEDGER, SITES, WARMFED, comparison_folder, run_folder

from warmfed import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
DARK, LIGHT = 0, 1  # Chromium's numbers of the preferred colour scheme

# Runs inside a copy of the report, tells the page around it what it found.
MEASURE = """<script>addEventListener("load", () => {
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  const root = document.documentElement, width = root.clientWidth;
  const name = (each) => `${each.tagName} ${each.textContent.trim().slice(0, 40)}`;
  const inside = (each) => each.closest(".scroll") === null;
  const out = [...document.body.querySelectorAll(":not(svg *)")].filter(inside).filter((each) => {
    const box = each.getBoundingClientRect();
    return box.width > 0 && (box.right > width + 1 || box.left < -1);
  });
  const cut = [...document.querySelectorAll("h1, h2, h3, p, dt, dd, a, li, summary, th, td")].filter((each) =>
    getComputedStyle(each).display !== "inline" && each.scrollWidth > each.clientWidth + 1);
  const overlapping = [...document.querySelectorAll("svg")].flatMap((svg) => {
    const texts = [...svg.querySelectorAll("text")];
    return texts.flatMap((one, place) => texts.slice(place + 1).filter((other) => {
      const [a, b] = [one.getBoundingClientRect(), other.getBoundingClientRect()];
      const [wide, high] = [Math.min(a.right, b.right) - Math.max(a.left, b.left),
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)];
      return wide > 1 && high > 0.35 * Math.min(a.height, b.height);
    }).map((other) => `${one.textContent} / ${other.textContent}`));
  });
  const hidden = [...document.querySelectorAll("svg")].flatMap((svg) => {
    const card = svg.closest(".card").getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter((text) => {
      const box = text.getBoundingClientRect();
      return box.right > card.right + 1 || box.left < card.left - 1;
    }).map(name);
  });
  const unseen = [...document.images].filter((each) => each.naturalWidth === 0).map((each) => each.alt);
  parent.postMessage({width, scroll: root.scrollWidth, out: out.map(name), cut: cut.map(name), overlapping, hidden, unseen,
    background: getComputedStyle(document.body).backgroundColor, plots: document.querySelectorAll("svg").length}, "*");
});</script>"""

# A frame of its own width, since a browser's window cannot be as narrow as a phone.
FRAME = """<!doctype html><link rel="icon" href="data:,"><title>waiting</title>
<script>addEventListener("message", (event) => { document.getElementById("found").textContent = JSON.stringify(event.data); });
</script><iframe src="measured.html" style="width: WIDTHpx; height: 9000px; border: 0"></iframe><pre id="found"></pre>"""

Browse = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Return the document of a page after loading, and the browser's log."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on the PATH; install one to check the report's layout")

    def open_page(path: Path, scheme: int = LIGHT) -> tuple[str, str]:
        command = [
            BROWSER, *FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1400,900", "--virtual-time-budget=5000",
            "--dump-dom", path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        return done.stdout, done.stderr

    return open_page


def measured(browse: Browse, path: Path, width: int, scheme: int = LIGHT) -> dict[str, Any]:
    """Return the result of `MEASURE` for the report at `path`, `width` pixels wide."""
    text = path.read_text()
    policy = re.search(r"<meta http-equiv=[^>]*>", text)
    assert policy is not None  # it would keep the measuring script from running, as it should
    (path.parent / "measured.html").write_text(text.replace(policy[0], "").replace("</body>", f"{MEASURE}</body>"))
    frame = path.parent / f"frame-{width}.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    document, _ = browse(frame, scheme)
    found = re.search(r'<pre id="found">(.+?)</pre>', document, re.DOTALL)
    assert found is not None, document[:500]
    values: dict[str, Any] = json.loads(html.unescape(found[1]))
    return values


LONG = "hospital-of-the-holy-spirit-south"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with everything, one whose names are long, and a comparison."""
    root = tmp_path_factory.mktemp("pages")

    def renamed(values: Any) -> Any:
        return json.loads(json.dumps(values).replace('"street"', f'"{LONG}"'))

    sites = {LONG if site == "street" else site: {"train": 9, "validation": 9, "test": 9} for site in SITES}
    classes = ("squamous cell carcinoma", "benign keratosis-like lesions")
    long = run_folder(root / "long", renamed(WARMFED), renamed(LEDGER), classes, sites=sites)
    report_images = long / "report_images" / "report_images.json"
    report_images.write_text(report_images.read_text().replace('"street"', f'"{LONG}"'))
    return {
        "run": report.write(run_folder(root / "run")),
        "long": report.write(long),
        "comparison": report.write_comparison(comparison_folder(root)),
    }


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["run", "long", "comparison"])
def test_nothing_is_cut_off(browse: Browse, pages: dict[str, Path], which: str, width: int) -> None:
    found = measured(browse, pages[which], width)

    assert found["width"] == width
    assert found["scroll"] == width  # no scrolling sideways
    assert found["plots"] > 3
    for fault in ("out", "cut", "overlapping", "hidden", "unseen"):
        assert found[fault] == [], fault


@pytest.mark.parametrize("which", ["run", "comparison"])
def test_the_console_stays_empty(browse: Browse, pages: dict[str, Path], which: str) -> None:
    document, log = browse(pages[which])

    assert "CONSOLE" not in log
    assert "</svg>" in document


def test_light_and_dark_differ(browse: Browse, pages: dict[str, Path]) -> None:
    grounds = [measured(browse, pages["run"], 390, scheme)["background"] for scheme in (LIGHT, DARK)]

    assert grounds == ["rgb(250, 248, 245)", "rgb(22, 19, 17)"]
