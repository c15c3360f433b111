"""docs/deploy.md, followed word for word in an empty folder; only the port is another."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "deploy.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def groups() -> Iterator[list[int]]:
    """The process groups of what was started, which end with the test."""
    started: list[int] = []
    yield started
    for group in started:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_the_guide(groups: list[int], tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    told = []
    for block in BLOCKS:
        with (tmp_path / "told.txt").open("w") as file:
            process = subprocess.Popen(
                ["sh", "-eu", "-c", block.replace("8000", port)], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            groups.append(process.pid)
            code = process.wait(900)
        told.append((tmp_path / "told.txt").read_text())
        logs = "".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in tmp_path.rglob("*.log"))
        assert code == 0, f"{block}\n{told[-1]}\n{logs}"
    assert len(BLOCKS) == 7
    server, predicted, left, late = told[1], *told[4:]
    assert "site ink may connect" in server
    for told_class in (predicted, late):
        assert re.search(r"digit\.png\s+(zero|one|two|three|four|five|six|seven|eight|nine)\s+\d", told_class)
    assert "personal model at site street: validation" in late
    assert "averaging.Model" in left
    assert (tmp_path / "consortium/sites/ink/left.html").stat().st_size > 1000
    assert len(list((tmp_path / "consortium/server/runs").glob("*/report.html"))) == 1
