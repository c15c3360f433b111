"""Architecture rules that no tool checks: training loops, seeds and imports."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "warmfed"
FILES = {path.relative_to(SOURCE).as_posix(): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in FILES.items()}


@functools.cache
def calls(name: str) -> set[str]:
    """Return the functions and methods that a file calls, by their last name."""
    found = (node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call))
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in found}


@functools.cache
def imports(name: str) -> set[str]:
    """Return the libraries that a file imports anywhere."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize(
    ("called", "home"),
    [
        ("backward", {"fit.py"}),
        ("manual_seed", {"core/rng.py"}),
        ("manual_seed_all", {"core/rng.py"}),
        ("seed", set()),
        ("hasattr", set()),
    ],
)
def test_called_in_one_place(called: str, home: set[str]) -> None:
    assert {name for name in FILES if called in calls(name)} <= home


@pytest.mark.parametrize("library", ["torchvision", "timm", "random", "dill", "joblib"])
def test_never_imported(library: str) -> None:
    assert not [name for name in FILES if library in imports(name)]


@pytest.mark.parametrize("library", ["diffusers", "peft", "transformers"])
def test_heavy_libraries_stay_in_their_folder(library: str) -> None:
    elsewhere = {
        "diffusers": set(),
        "peft": {"models/pretrained.py"},
        "transformers": {"evaluation/features.py", "models/pretrained.py", "pretraining/captions.py"},
    }[library]
    assert {name for name in FILES if library in imports(name) and not name.startswith("diffusion/")} == elsewhere


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("datasets", {"data/extras.py"}),
        ("pickle", {"transports/process_pool.py"}),  # between the processes of one run only
        ("flwr_datasets", {"data/extras.py"}),
        ("flwr", {"transports/flower.py", "transports/flower_processes.py"}),
        ("cryptography", {"deploy/keys.py"}),
        ("uvicorn", {"deploy/guard.py"}),
    ],
)
def test_imported_where_it_belongs(library: str, home: set[str]) -> None:
    assert {name for name in FILES if library in imports(name)} == home


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"weights_only=False|torch\.save\(", set()),
        (r"torch\.load\(", {"models/convert.py"}),
        (r"for \w+ in range\([^)]*rounds|for [\w, ]+ in .*\bstages\(\).*:$", {"run.py"}),
        (r"except( BaseException)?:", set()),
        (
            r"\.(exists|is_file|is_dir|iterdir|expanduser|resolve)\(\)|\.rglob\(",
            {"utils/paths.py", "utils/files.py"},
        ),
    ],
    ids=["unpickled weights", "weights of torch", "loops over rounds", "bare except", "paths examined without utils/paths.py"],
)
def test_written_in_one_place(pattern: str, home: set[str]) -> None:
    assert {name for name, text in FILES.items() if re.search(pattern, text, re.MULTILINE)} <= home


def test_files_stay_small() -> None:
    tests = {path.name: path.read_text() for path in Path(__file__).parent.rglob("*.py")}
    assert not {name: lines for name, text in {**FILES, **tests}.items() if (lines := text.count("\n")) > 500}


def test_leaves_are_final_and_every_module_says_what_it_is() -> None:
    assert not [name for name, text in FILES.items() if text.strip() and not ast.get_docstring(TREES[name])]
    for name in FILES:
        if name.startswith("algorithms/"):
            for node in TREES[name].body:
                marks = {ast.unparse(mark) for mark in getattr(node, "decorator_list", [])}
                if isinstance(node, ast.ClassDef) and "final" in marks:
                    assert "dataclass(frozen=True)" in marks
                    families = (
                        "WithoutGenerator",
                        "Rounds",
                        "Combined",
                        "Averaging",
                        "PartlyShared",
                        "SplitByName",
                        "Personalized",
                        "FromGenerator",
                        "WarmStarted",
                        "HeadFromFeatures",
                    )
                    assert all(ast.unparse(base).partition("[")[0] in families for base in node.bases)


def test_an_algorithm_calls_super_only_to_make_a_network() -> None:
    text = {name: text for name, text in FILES.items() if name.startswith("algorithms/")}
    assert not [name for name, each in text.items() if re.search(r"super\(\)(?!\.__init__\(\))", each)]


def test_stage_functions_name_their_messages() -> None:
    """A leaf's functions say what comes, what stays and what goes: `Any` and `Message` say nothing."""
    for name in FILES:
        if name.startswith("algorithms/") and not name.startswith("algorithms/shared/"):
            for node in ast.walk(TREES[name]):
                if isinstance(node, ast.FunctionDef) and any(
                    a.arg in ("received", "server", "replies") for a in node.args.args
                ):
                    words = {ast.unparse(a.annotation) for a in node.args.args if a.annotation} | {ast.unparse(node.returns)}
                    vague = [word for word in words if re.search(r"\bAny\b|\bMessage\b|^Repl(y|ies)$", word)]
                    assert not vague, f"{name}: {node.name} has {vague}"


def test_algorithm_files_do_not_repeat_each_other() -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "repetition.py", "--folder", ROOT / "src" / "warmfed" / "algorithms"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith("0 blocks"), found.stdout
