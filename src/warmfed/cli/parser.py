"""The command line. What a command needs is imported when it runs: `warmfed --help` is instant."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..utils.errors import InputError, printable
from ..utils.version import __version__

_MOST = 4000
"""Characters of an error's line."""
CODES = """exit codes:
  0    done
  1    verify found a difference
  2    bad input: one line says what was expected, what came and what to do; nothing has been changed; or a check fails
  130  interrupted; the line says how to go on
"""


_RENAMED = {"--unseen": "--holdout-site", "--tested": "--reference"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        for old, new in _RENAMED.items():
            if old in message.split():
                raise InputError(f"{old} is now called {new}; rename it")
        raise InputError(f"{message}; `{self.prog} --help` shows what there is")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        asked = parser().parse_args(arguments)
        if asked.command is None:
            parser().print_help()
            return 0
        from . import commands

        return int(getattr(commands, asked.command)(asked))
    except InputError as error:
        print(f"warmfed: {printable(str(error), _MOST)}", file=sys.stderr)
        return 2
    except RecursionError:
        print("warmfed: the input is nested too deeply; expected a few levels of tables and lists", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"warmfed: interrupted{''.join(f'; {printable(str(words), _MOST)}' for words in stop.args)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # who read our output has gone (`| head`); nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="warmfed",
        description="Federated learning that gives every site a strong global and a strong personal image classifier.",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"warmfed {__version__}")
    top.set_defaults(command=None)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    run = _command(commands, "run", "run an algorithm over a federation; without arguments: WarmFed on digits4")
    run.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="a configuration; see docs/cli.md")
    run.add_argument("--algorithm", metavar="NAME", help="one of `warmfed algorithms`")
    run.add_argument("--seed", type=int, metavar="N", help="names every random number (default 0)")
    run.add_argument("--rounds", type=int, metavar="R", help="rounds of training; 0: one shot, where the algorithm has it")
    run.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default runs/ALGORITHM-SEED, never overwritten)")
    run.add_argument("--dry-run", action="store_true", help="build and check all, count steps, time and memory; run nothing")
    places = ("inprocess", "flower", "flower-simulation")
    run.add_argument("--transport", default=places[0], choices=places, help="where the sites are: here, elsewhere, or on Ray")
    run.add_argument("--superlink", default="local", metavar="NAME", help="flower: a connection in Flower's config.toml")
    _workers(run, "processes that work at the same time; they cannot change a result")
    _settings(run)
    _voices(run)

    doctor = _command(commands, "doctor", "every file that a run will read, with size and hash, there or not; runs nothing")
    doctor.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="a configuration; none: WarmFed on digits4")
    doctor.add_argument("--algorithm", metavar="NAME", help="one of `warmfed algorithms`")
    _settings(doctor)
    doctor.add_argument("--json", action="store_true", help="as JSON")

    resume = _command(commands, "resume", "finish a run that was interrupted")
    resume.add_argument("folder", type=Path, metavar="DIR", help="a run folder")
    _workers(resume, "processes that work at the same time; they cannot change a result")
    _voices(resume)

    compare = _command(commands, "compare", "run algorithms x seeds x rounds and make one table of them")
    compare.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="what all share; may hold [compare] and [arms.NAME]"
    )
    compare.add_argument("--algorithms", nargs="+", default=[], metavar="NAME", help="algorithms, or arms of CONFIG.toml")
    _study(compare)

    sweep = _command(commands, "sweep", "try every combination of settings and choose by validation")
    sweep.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="what all share; may hold [sweep]")
    sweep.add_argument("--algorithms", nargs="+", default=[], metavar="NAME", help="default: warmfed")
    sweep.add_argument(
        "--grid", nargs="+", action="extend", default=[], metavar="key=a,b,c", help="a setting and the values to try"
    )
    _study(sweep)

    report = _command(commands, "report", "write the report of a finished run, or of a comparison, anew")
    report.add_argument("folder", type=Path, metavar="DIR", help="a run folder, or that of a comparison")

    data = _command(commands, "data", "what a configuration's data are: sites, classes, splits, duplicates, and every fault")
    data.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="a configuration; none: digits4")
    data.add_argument("--plot", type=Path, metavar="FILE", help="draw who holds how much of what (.png, .svg or .pdf)")
    data.add_argument("--save", type=Path, metavar="FILE.json", help="write which image is where, to deal them so again")
    _settings(data)
    data.add_argument("--json", action="store_true", help="as JSON")

    predict = _command(commands, "predict", "class and probability of pictures, by a finished run's model")
    predict.add_argument("folder", type=Path, metavar="DIR", help="a run folder")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    predict.add_argument("--site", default="", metavar="NAME", help="ask this site's personal model, not the global one")
    predict.add_argument("--json", action="store_true", help="JSON, with the probabilities of all classes")

    personalize = _command(
        commands, "personalize", "make a personal model of a finished run's global one, at a site that comes late"
    )
    personalize.add_argument("folder", type=Path, metavar="DIR", help="a run folder, or what of it was released")
    personalize.add_argument("site", type=Path, metavar="SITE", help="the site's folder, with site.toml")
    personalize.add_argument("--out", type=Path, metavar="DIR", help="new folder (default work/runs/late-NAME at the site)")
    personalize.add_argument("--json", action="store_true", help="as JSON")

    synthesize = _command(commands, "synthesize", "draw images by a finished run's adapters or diffusion model")
    synthesize.add_argument("folder", type=Path, metavar="DIR", help="a run folder")
    synthesize.add_argument("--site", default="", metavar="NAME", help="draw by this site's adapter or model")
    synthesize.add_argument(
        "--label", nargs="+", default=[], dest="labels", metavar="CLASS", help="names of classes (default all)"
    )
    synthesize.add_argument("--count", type=_positive, default=8, metavar="N", help="images of each class (default 8)")
    synthesize.add_argument("--seed", type=int, default=0, metavar="N", help="names every random number (default 0)")
    synthesize.add_argument("--grid", type=Path, dest="picture", metavar="FILE.png", help="a picture, a row for each class")
    synthesize.add_argument("--out", type=Path, metavar="FILE.safetensors", help="the images with their labels")
    _voices(synthesize)

    pretrain = _command(commands, "pretrain", "pre-train a generator's base on public images: rendered digits, or your own")
    pretrain.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings of pre-training, and [data]; none: digits"
    )
    pretrain.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the base, in diffusers' layout")
    pretrain.add_argument("--work", type=Path, metavar="DIR", help="keeps finished phases, so that a later call goes on")
    pretrain.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    _settings(pretrain)
    _voices(pretrain)

    algorithms = _command(commands, "algorithms", "list the algorithms")
    algorithms.add_argument("--json", action="store_true", help="as JSON")

    verify = _command(commands, "verify", "run a finished run again and compare record by record, and the models")
    verify.add_argument("folder", type=Path, metavar="DIR", help="a run folder")
    _workers(verify, "processes of the rerun; they cannot change a result")
    _voices(verify)

    deploy = _command(commands, "deploy", "deploy over Flower on machines that share no images")
    _deploy(deploy.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser, required=True))

    site_report = _command(commands, "site-report", "what has left a site: kinds, tensors, bytes, hashes, when")
    site_report.add_argument("folder", type=Path, metavar="DIR", help="a site's folder, or a run folder")
    site_report.add_argument("--site", default="", metavar="NAME", help="which site of a run folder")
    ways = site_report.add_mutually_exclusive_group()
    ways.add_argument("--json", action="store_true", help="as JSON")
    ways.add_argument("--html", type=Path, metavar="FILE", help="write one HTML page that loads nothing")
    return top


def _deploy(commands: Any) -> None:
    """The commands below `deploy`."""
    init = _command(commands, "init", "write a ready project: Flower app, server, sites, certificates and keys", "deploy_")
    init.add_argument("folder", type=Path, metavar="DIR", help="new folder of the project")
    init.add_argument("--sites", required=True, metavar="A,B,…", help="names of the sites")
    init.add_argument("--host", default="localhost", metavar="NAME", help="name or address of the server (default localhost)")
    init.add_argument("--port", type=_positive, default=8000, metavar="N", help="of the server (default 8000)")
    init.add_argument("--config", type=Path, metavar="CONFIG.toml", help="the run's configuration, as of `warmfed run`")
    init.add_argument("--classes", default="", metavar="A,B,…", help="in order; default: those of the configuration's data")
    init.add_argument("--prompts", default="", metavar="TEXT", help="template with one {} for the class; default: likewise")

    add = _command(commands, "add-site", "add a site to a project", "deploy_")
    add.add_argument("folder", type=Path, metavar="DIR", help="the project")
    add.add_argument("name", metavar="NAME", help="of the new site")

    renew = _command(commands, "renew", "make the server a new certificate of the same authority", "deploy_")
    renew.add_argument("folder", type=Path, metavar="DIR", help="the project")

    register = _command(commands, "register", "let the sites whose keys are in the server's nodes/ connect", "deploy_")
    register.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="folder of the server (default .)"
    )

    check = _command(commands, "check", "say whether a server's or site's machine is ready, and what to do", "deploy_")
    where = "folder of a server or site (default .)"
    check.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help=where)
    check.add_argument("--json", action="store_true", help="as JSON")


def _command(commands: Any, name: str, about: str, above: str = "") -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    command.set_defaults(command=above + name.replace("-", "_"))
    return command


def _study(command: argparse.ArgumentParser) -> None:
    """What all commands take that run many runs."""
    command.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="default 0 1 2")
    command.add_argument("--rounds", nargs="+", type=int, default=[], metavar="R", help="default: what the configuration says")
    command.add_argument(
        "--holdout-site",
        nargs="+",
        default=[],
        metavar="SITE",
        help="leave these sites out, one at a time, and measure there too",
    )
    command.add_argument("--reference", default="", metavar="NAME", help="compare this arm with each other one in the tests")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder of the study; an existing one goes on")
    _workers(command, "runs at the same time (default: one for each processor)")
    _settings(command)
    _voices(command)


def _workers(command: argparse.ArgumentParser, about: str) -> None:
    command.add_argument("--workers", type=_positive, default=0, metavar="N", help=about)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 was expected, got {text!r}")
    return int(text)


def _settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], dest="settings", metavar="key=value",
        help="any setting by its dotted name: algorithm.local.lr=0.01",
    )  # fmt: skip


def _voices(command: argparse.ArgumentParser) -> None:
    voices = command.add_mutually_exclusive_group()
    voices.add_argument("--quiet", action="store_true", help="print nothing but the path of what was made")
    voices.add_argument("--json", action="store_true", help="print events as JSON lines")
