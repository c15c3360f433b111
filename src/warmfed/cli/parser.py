"""Parser of the command line. Commands import their modules when they run, so that `warmfed --help` is fast."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..utils.errors import InputError, demand_text, printable
from ..utils.output import OutputError, complain, discard, output_fails, prepare_output
from ..utils.version import __version__

_MOST = 4000
"""Most characters of an error's line."""
CODES = """exit codes:
  0    done
  1    verify found a difference
  2    invalid input: one line gives the expected and the actual value, and how to fix it; nothing is changed;
       or a check failed
       or the output cannot be written: the line says how to resume
  130  interrupted (143: by SIGTERM); the line says how to resume
"""


_RENAMED = {"--unseen": "--holdout-site", "--tested": "--reference"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        for old, new in _RENAMED.items():
            if old in message.split():
                raise InputError(f"{old} is now called {new}; rename it")
        raise InputError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    prepare_output()
    terminated: list[int] = []
    with _interrupted_by_sigterm(terminated):
        try:
            code = _run(arguments)
            if fault := output_fails():
                raise fault
            return code
        except InputError as error:
            complain(f"warmfed: {printable(str(error), _MOST)}")
            return 2
        except RecursionError:
            complain("warmfed: the input is nested too deeply; expected a few levels of tables and lists")
            return 2
        except KeyboardInterrupt as stop:
            complain(f"warmfed: interrupted{''.join(f'; {printable(str(words), _MOST)}' for words in stop.args)}")
            return 143 if terminated else 130
        except BrokenPipeError:
            discard(sys.stdout)  # the reader of the output has ended (`| head`)
            return 141
        except (OSError, OutputError) as error:
            fault = output_fails()
            if fault is None:
                if isinstance(error, OSError) and error.filename is not None:
                    place = printable(str(error.filename), 300)
                    complain(f"warmfed: cannot use {place}: {error.strerror}; check the path, its permissions and free space")
                    return 2
                raise
            discard(sys.stdout)
            advice = f"; {printable(str(error), _MOST)}" if isinstance(error, OutputError) and str(error) else ""
            complain(f"warmfed: cannot write the output: {fault.strerror}{advice}")
            return 2


def _run(arguments: Sequence[str] | None) -> int:
    try:
        asked = parser().parse_args(arguments)
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    for value in vars(asked).values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                demand_text(text, "an argument")
    if asked.command is None:
        parser().print_help()
        return 0
    from . import commands

    return int(getattr(commands, asked.command)(asked))


@contextmanager
def _interrupted_by_sigterm(terminated: list[int]) -> Iterator[None]:
    """Let SIGTERM, which schedulers and service managers send, do what Ctrl-C does; then append to `terminated`."""

    def interrupt(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # some senders send it twice
        terminated.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield  # another program decides
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = _Parser(
        prog="warmfed",
        description="Federated learning of a strong global and a strong personal image classifier for every site.",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"warmfed {__version__}")
    top.set_defaults(command=None)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    run = _command(commands, "run", "run an algorithm over a federation (default: WarmFed on digits4)")
    run.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="configuration; see docs/cli.md")
    run.add_argument("--algorithm", metavar="NAME", help="name of an algorithm; see `warmfed algorithms`")
    run.add_argument("--seed", type=_seed, metavar="N", help="seed of all random streams (default 0)")
    run.add_argument("--rounds", type=int, metavar="R", help="rounds of training; 0: one shot, if the algorithm supports it")
    run.add_argument("--out", type=Path, metavar="DIR", help="new run folder (default runs/ALGORITHM-SEED)")
    run.add_argument("--dry-run", action="store_true", help="check the run and estimate steps, time and memory; run nothing")
    transports = ("inprocess", "flower", "flower-simulation")
    run.add_argument(
        "--transport", default=transports[0], choices=transports,
        help="connection to the sites: on this machine, over Flower, or simulated on Ray (default inprocess)",
    )  # fmt: skip
    run.add_argument("--superlink", default="local", metavar="NAME", help="flower: a connection in Flower's config.toml")
    _workers(run, "number of worker processes; results do not depend on it")
    _settings(run)
    _voices(run)

    doctor = _command(commands, "doctor", "list all files that a run reads, with size and SHA-256; run nothing")
    doctor.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="configuration (default: WarmFed on digits4)"
    )
    doctor.add_argument("--algorithm", metavar="NAME", help="name of an algorithm; see `warmfed algorithms`")
    _settings(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")

    resume = _command(commands, "resume", "finish an interrupted run")
    resume.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    _workers(resume, "number of worker processes; results do not depend on it")
    _voices(resume)

    compare = _command(commands, "compare", "run algorithms x seeds x rounds and write one table")
    compare.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="shared configuration, with [compare] and [arms.NAME]"
    )
    compare.add_argument("--algorithms", nargs="+", default=[], metavar="NAME", help="algorithms, or arms of CONFIG.toml")
    _study(compare)

    sweep = _command(commands, "sweep", "run every combination of settings and choose by validation accuracy")
    sweep.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="shared configuration, with [sweep]")
    sweep.add_argument("--algorithms", nargs="+", default=[], metavar="NAME", help="algorithms (default warmfed)")
    sweep.add_argument(
        "--grid", nargs="+", action="extend", default=[], metavar="key=a,b,c", help="setting and its values to try"
    )
    _study(sweep)

    report = _command(commands, "report", "write the report of a finished run or of a comparison again")
    report.add_argument("folder", type=Path, metavar="DIR", help="run folder, or folder of a comparison")

    data = _command(commands, "data", "show a configuration's data: sites, classes, splits, duplicates and faults")
    data.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="configuration (default: digits4)")
    data.add_argument("--plot", type=Path, metavar="FILE", help="plot the images by site and class (.png, .svg or .pdf)")
    data.add_argument("--save", type=Path, metavar="FILE.json", help="write the partition, for later runs with the same one")
    _settings(data)
    data.add_argument("--json", action="store_true", help="print JSON")

    predict = _command(commands, "predict", "classify images with a model of a finished run")
    predict.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    predict.add_argument("--site", default="", metavar="NAME", help="site of the personal model (default: global model)")
    predict.add_argument("--json", action="store_true", help="print JSON, with the probabilities of all classes")

    personalize = _command(commands, "personalize", "fine-tune a finished run's global model at a site that joins late")
    personalize.add_argument("folder", type=Path, metavar="DIR", help="run folder, or its released part")
    personalize.add_argument("site", type=Path, metavar="SITE", help="folder of the site, with site.toml")
    personalize.add_argument("--out", type=Path, metavar="DIR", help="new folder (default work/runs/late-NAME at the site)")
    personalize.add_argument("--json", action="store_true", help="print JSON")

    synthesize = _command(commands, "synthesize", "sample images with a finished run's adapters or diffusion model")
    synthesize.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    synthesize.add_argument("--site", default="", metavar="NAME", help="site of the adapter or model")
    synthesize.add_argument(
        "--label", nargs="+", default=[], dest="labels", metavar="CLASS", help="names of classes (default all)"
    )
    synthesize.add_argument("--count", type=_positive, default=8, metavar="N", help="images of each class (default 8)")
    synthesize.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of all random streams (default 0)")
    synthesize.add_argument("--grid", type=Path, dest="picture", metavar="FILE.png", help="PNG to write, a row per class")
    synthesize.add_argument("--out", type=Path, metavar="FILE.safetensors", help="file to write, images with labels")
    _voices(synthesize)

    convert = _command(commands, "convert", "convert weights that torch has saved (.pth, .bin) to safetensors")
    convert.add_argument("weights", type=Path, metavar="FILE", help="file of tensors by name; nothing else in it is loaded")
    convert.add_argument("out", type=Path, metavar="OUT.safetensors", help="new file")

    pretrain = _command(commands, "pretrain", "pre-train a generator's base on public images: rendered digits, or your own")
    pretrain.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings of pre-training, and [data] (default: digits)"
    )
    pretrain.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the base, in diffusers' layout")
    pretrain.add_argument("--work", type=Path, metavar="DIR", help="folder of finished phases, from which a later call resumes")
    pretrain.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device (default cpu)")
    _settings(pretrain)
    _voices(pretrain)

    algorithms = _command(commands, "algorithms", "list the algorithms")
    algorithms.add_argument("--json", action="store_true", help="print JSON")

    verify = _command(commands, "verify", "rerun a finished run and compare its records and models")
    verify.add_argument("folder", type=Path, metavar="DIR", help="run folder")
    _workers(verify, "number of worker processes of the rerun; results do not depend on it")
    _voices(verify)

    deploy = _command(commands, "deploy", "deploy over Flower on machines that share no images")
    _deploy(deploy.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser, required=True))

    site_report = _command(commands, "site-report", "list the messages that a site has sent")
    site_report.add_argument("folder", type=Path, metavar="DIR", help="folder of a site, or run folder")
    site_report.add_argument("--site", default="", metavar="NAME", help="site, for a run folder")
    ways = site_report.add_mutually_exclusive_group()
    ways.add_argument("--json", action="store_true", help="print JSON")
    ways.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained HTML page")
    return top


def _deploy(commands: Any) -> None:
    """Add the commands below `deploy`."""
    init = _command(commands, "init", "write a new project: Flower app, server, sites, certificates and keys", "deploy_")
    init.add_argument("folder", type=Path, metavar="DIR", help="new folder of the project")
    init.add_argument("--sites", required=True, metavar="A,B,…", help="names of the sites")
    init.add_argument("--host", default="localhost", metavar="NAME", help="name or address of the server (default localhost)")
    init.add_argument("--port", type=_positive, default=8000, metavar="N", help="port of the server (default 8000)")
    init.add_argument("--config", type=Path, metavar="CONFIG.toml", help="configuration of the run, as for `warmfed run`")
    init.add_argument("--classes", default="", metavar="A,B,…", help="classes in order (default: those of the data)")
    init.add_argument("--prompts", default="", metavar="TEXT", help="template with one {} for the class (default: the data's)")

    add = _command(commands, "add-site", "add a site to a project", "deploy_")
    add.add_argument("folder", type=Path, metavar="DIR", help="folder of the project")
    add.add_argument("name", metavar="NAME", help="name of the new site")

    renew = _command(commands, "renew", "write a new certificate of the server, signed by the same authority", "deploy_")
    renew.add_argument("folder", type=Path, metavar="DIR", help="folder of the project")

    register = _command(commands, "register", "register the sites whose keys are in the server's nodes/", "deploy_")
    register.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="folder of the server (default .)"
    )

    check = _command(commands, "check", "check the machine of a server or site, and list how to fix faults", "deploy_")
    where = "folder of a server or site (default .)"
    check.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help=where)
    check.add_argument("--json", action="store_true", help="print JSON")


def _command(commands: Any, name: str, about: str, above: str = "") -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    command.set_defaults(command=above + name.replace("-", "_"))
    return command


def _study(command: argparse.ArgumentParser) -> None:
    """Add the arguments of compare and sweep."""
    command.add_argument("--seeds", nargs="+", type=_seed, default=[], metavar="N", help="seeds (default 0 1 2)")
    command.add_argument("--rounds", nargs="+", type=int, default=[], metavar="R", help="rounds (default: the configuration's)")
    command.add_argument(
        "--holdout-site",
        nargs="+",
        default=[],
        metavar="SITE",
        help="hold out these sites, one at a time, and evaluate there, too",
    )
    command.add_argument("--reference", default="", metavar="NAME", help="arm that the tests compare with each other arm")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of the study; an existing one is resumed")
    _workers(command, "number of parallel runs (default: one per CPU)")
    _settings(command)
    _voices(command)


def _workers(command: argparse.ArgumentParser, about: str) -> None:
    command.add_argument("--workers", type=_positive, default=0, metavar="N", help=about)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected a seed from 0 to 2**63 - 1, got {seed}")
    return seed


def _settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], dest="settings", metavar="key=value",
        help="a setting by its dotted key: algorithm.local.lr=0.01",
    )  # fmt: skip


def _voices(command: argparse.ArgumentParser) -> None:
    voices = command.add_mutually_exclusive_group()
    voices.add_argument("--quiet", action="store_true", help="print only the path of the result")
    voices.add_argument("--json", action="store_true", help="print events as JSON lines")
