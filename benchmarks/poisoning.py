"""One poisoned site of four: which attack is stopped by what, and what is left of the model at the honest sites.

A transport around the sites changes what one of them sends. Which site that is goes round with the seed. Equal work is done
once: warm starts and the sites' replies are kept under digests of all they depend on. A study that was stopped goes on.

    python benchmarks/poisoning.py --work runs/poisoning [--seeds 0 1 2 3 4] [--only ARM …] [--out benchmarks/results/poisoning]
"""

import argparse
import hashlib
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from warmfed.config import Config, parse
from warmfed.core import Empty, Exchange, Metrics, Reply, Round, ServerContext
from warmfed.core.messages import Message, decode, encode
from warmfed.core.tensors import Tensors
from warmfed.data import Federation
from warmfed.data.readers.digits4 import digits4
from warmfed.diffusion.result_cache import CachedGenerator
from warmfed.run import run
from warmfed.runs.backend import server_side
from warmfed.runs.generators import build_generator
from warmfed.runs.prepare import clients_of
from warmfed.runs.progress import RunListener
from warmfed.tasks import Classify
from warmfed.transports.client import Client
from warmfed.utils.errors import InputError
from warmfed.utils.files import atomic_write, read_checksummed, read_json, write_checksummed, write_json

Tamper = Callable[[Reply[Any], Message], Reply[Any]]
SHARE = 0.5
"""What `warmfed deploy init` writes for `server.max_weight_share`: no site weighs more than all others together."""
FACTOR = 10**6
"""How many times its rows a site declares if it inflates them."""


def moved(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Tamper:
    """A model made of what was sent and of what the site has learned."""

    def tamper(reply: Reply[Any], down: Any) -> Reply[Any]:
        sent = down.model
        model = {
            name: change(sent[name].double(), value.double()).to(value.dtype) for name, value in reply.message.model.items()
        }
        return replace(reply, message=replace(reply.message, model=model))

    return tamper


def heavier(factor: float) -> Tamper:
    return lambda reply, down: replace(reply, weight=reply.weight * factor)


def both(first: Tamper, second: Tamper) -> Tamper:
    return lambda reply, down: second(first(reply, down), down)


def adapter(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Tamper:
    def tamper(reply: Reply[Any], down: Message) -> Reply[Any]:
        changed = {name: change(name, value) for name, value in reply.message.adapter.items()}
        return replace(reply, message=replace(reply.message, adapter=changed))

    return tamper


def prompts(order: Callable[[int], list[int]]) -> Tamper:
    """The learned prompt of class i is that of class order[i]."""
    return adapter(lambda name, value: value[order(len(value))] if name == "prompts" else value)


SCALED = moved(lambda sent, came: sent + 1000 * (came - sent))
UPDATES: dict[str, Tamper] = {
    "update × 1000": SCALED,
    "sign flipped × 10": moved(lambda sent, came: sent - 10 * (came - sent)),
    "finite 1e30": moved(lambda sent, came: torch.full_like(came, 1e30)),
    "weight 1e9": heavier(1e9),
    "rows inflated": heavier(FACTOR),
    "rows inflated, update × 1000": both(heavier(FACTOR), SCALED),
}
ADAPTERS: dict[str, Tamper] = {
    "labels rolled": prompts(lambda n: [*range(1, n), 0]),
    "half of the labels rolled": prompts(lambda n: [*range(1, n // 2), 0, *range(n // 2, n)]),
    "all prompts draw one class": prompts(lambda n: [3] * n),
    "draws noise": adapter(lambda name, value: value if name == "prompts" else 8 * value),
}
ATTACKS = ("none", "site left out", *UPDATES, *ADAPTERS)
ONE_SHOT = tuple(ADAPTERS)[1:]
"""Attacks of which only the warm start is measured."""
ARMS: dict[str, dict[str, Any]] = {
    "warmfed": {"algorithm.name": "warmfed", "server.max_weight_share": SHARE},
    "warmfed, no defence": {
        "algorithm.name": "warmfed",
        "algorithm.synthesis.contradicted": 0.0,
        "server.max_update_ratio": 0.0,
    },
    **{
        f"fedavg, {rule}": {"algorithm.name": "fedavg", "algorithm.robust.rule": rule, "server.max_update_ratio": 0.0}
        for rule in ("mean", "median", "trimmed", "krum")
    },
}
ARMS["fedavg, trimmed"]["algorithm.robust.trim"] = 0.25  # one of four at each end
ARMS["fedavg, krum"]["algorithm.robust.faulty"] = 0  # against one faulty site it needs five answers
ARMS["fedavg, mean, norm bound"] = {"algorithm.name": "fedavg", "server.max_weight_share": SHARE}


@dataclass
class Tampered:
    """A transport over sites in this process; what one of them sends in some stages is changed on its way."""

    workers: Mapping[str, Client]
    liar: str
    tampers: Mapping[str, Tamper]
    kept: Path
    states: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.workers))

    def send(
        self, step: int, stage: str, number: int, down: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply[Any], tuple[Exchange, ...]]]:
        for site, content in down.items():
            reply = self._work(site, stage, number, content)
            self.states[site] = reply.state
            if site == self.liar and stage in self.tampers:
                reply = self.tampers[stage](reply, content)
            yield site, reply, ()

    def _work(self, site: str, stage: str, number: int, down: Message) -> Reply[Any]:
        """What the site answers; equal work of another cell is not done again."""
        worker, state = self.workers[site], self.states.get(site)
        settings = [
            getattr(worker.algorithm, name, None) for name in ("local", "personal", "distill", "distillation", "rounds")
        ]
        made_of = repr((site, stage, number, worker.seed, type(worker.algorithm).__name__, settings)).encode()
        parts = [encode(each) for each in (down, state if state is not None else Empty())]
        path = self.kept / f"{hashlib.sha256(b'|'.join([made_of, *parts])).hexdigest()}.bin"
        if path.exists():
            return decode(read_checksummed(path, "a reply of another cell"), Reply)
        reply = worker.work(stage, number, down, state)
        write_checksummed(path, encode(reply))
        return reply

    def evaluate(self, down: Mapping[str, Message], model: Tensors | None) -> Mapping[str, Mapping[str, Metrics]]:
        return {site: self.workers[site].evaluate(content, self.states.get(site), model) for site, content in down.items()}


@dataclass(frozen=True)
class Cell:
    """One run: an arm under an attack."""

    arm: str
    attack: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.attack}-{self.seed}".replace(" ", "_").replace(",", "").replace("×", "x")

    @property
    def config(self) -> Config:
        return parse(None, {**ARMS[self.arm], "seed": self.seed, "evaluate": "last", "server.min_sites": 1})

    @property
    def possible(self) -> bool:
        warm = self.arm.startswith("warmfed")
        return warm if self.attack in ADAPTERS else True


def measured(cell: Cell, work: Path) -> dict[str, Any]:
    """Run a cell; its figures, and those of its warm start."""
    config, whole = cell.config, digits4()
    liar = sorted(whole.sites)[cell.seed % len(whole.sites)]
    federation = whole.without(liar) if cell.attack == "site left out" else whole
    began = time.process_time()
    figures: dict[str, Any] = {"arm": cell.arm, "attack": cell.attack, "seed": cell.seed, "site": liar, "set_aside": []}
    try:
        start = None
        if config.name == "warmfed":
            server, warm = warm_start(config, cell, federation, liar, work)
            figures |= {"one_shot": warm["accuracy"], "set_aside": warm["set_aside"], "warm": warm["aggregate"]}
            start = (2, server)
        if cell.attack not in ONE_SHOT:
            tampers = {"train": UPDATES[cell.attack]} if cell.attack in UPDATES else {}
            for done in rounds(config, federation, liar, tampers, work, start):
                told = [f"{site} in {done.stage} {done.number + 1}: {reason}" for site, reason in done.absent.items()]
                figures["set_aside"] = [*figures["set_aside"], *told]
                if done.evaluation:
                    figures["accuracy"] = honest(done, liar)
    except InputError as error:
        figures["stopped"] = str(error)
    return figures | {"seconds": round(time.process_time() - began, 1)}


def rounds(
    config: Config, federation: Federation, liar: str, tampers: Mapping[str, Tamper], work: Path, start: Any
) -> Iterator[Round]:
    task = Classify(federation.shape, len(federation.classes))
    form = build_generator(config.generator, config.algorithm.needs_generator)
    generator = None if form is None else CachedGenerator(form, work / "shared")
    workers = clients_of(config.algorithm, federation, task, config.seed, generator, "cpu")
    transport = Tampered(workers, liar, tampers, work / "replies")
    declared = {site: dict(rows) for site, rows in federation.rows.items()}
    if tampers.get("train") in (UPDATES["rows inflated"], UPDATES["rows inflated, update × 1000"]):
        declared[liar] = {split: rows * FACTOR for split, rows in declared[liar].items()}
    central: ServerContext = server_side(task, transport, federation.prompts, generator, "cpu", None, RunListener(), declared)
    last = "every" if start is None and config.name == "warmfed" else "last"
    yield from run(config.algorithm, central, transport, config.seed, start=start, evaluate=last, admission=config.server)


def warm_start(config: Config, cell: Cell, federation: Federation, liar: str, work: Path) -> tuple[Message, dict[str, Any]]:
    """The server after its warm start, and what the record shows of it; made once for all attacks on the updates."""
    lie = cell.attack if cell.attack in ADAPTERS or cell.attack == "site left out" else "none"
    judged = bool(config.algorithm.synthesis.contradicted) and lie in ADAPTERS  # else nobody is set aside
    path = work / "warm" / f"{lie.replace(' ', '_')}-{'judged' if judged else 'plain'}-{cell.seed}.bin"
    told = path.with_suffix(".json")
    if told.exists():
        return decode(read_checksummed(path, "a warm start")), read_json(told, "a warm start")
    tampers = {"adapt": ADAPTERS[lie]} if lie in ADAPTERS else {}
    for done in rounds(config, federation, liar, tampers, work, None):
        if done.stage == "warm":
            break
    aside = [f"{key.removeprefix('set_aside/')} in warm" for key in done.aggregate if key.startswith("set_aside/")]
    found = {"accuracy": honest(done, liar), "aggregate": dict(done.aggregate), "set_aside": aside}
    write_checksummed(path, encode(done.server))
    write_json(told, found)
    return done.server, found


def honest(done: Round, liar: str) -> dict[str, float]:
    """The global model's test accuracy at the honest sites, in percent."""
    found = [views["global/test"]["accuracy"] for site, views in done.evaluation.items() if site != liar]
    return {"mean": statistics.fmean(found), "worst": min(found)}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row for each arm and attack."""
    head = ("method", "attack", "mean of sites, %", "worst site, %", "against left out", "one-shot, %", "set aside", "seeds")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---:|---|---:|"]
    for arm in ARMS:
        for attack in ATTACKS:
            mine = [c for c in cells if (c["arm"], c["attack"]) == (arm, attack)]
            if not mine:
                continue
            out = {c["seed"]: c for c in cells if (c["arm"], c["attack"]) == (arm, "site left out")}
            compared = "accuracy" if attack not in ONE_SHOT else "one_shot"
            pairs = [c[compared]["mean"] - out[c["seed"]][compared]["mean"] for c in mine if c["seed"] in out and compared in c]
            stopped = sum("stopped" in c for c in mine)
            values = [_mean(mine, "accuracy", "mean"), _mean(mine, "accuracy", "worst")]
            aside = sum(any(told.startswith(c["site"]) for told in c["set_aside"]) for c in mine)
            strangers = sum(any(not told.startswith(c["site"]) for told in c["set_aside"]) for c in mine)
            who = f"{aside} of {len(mine)}" + (f", honest in {strangers}" if strangers else "")
            row = [
                arm,
                attack,
                *values,
                f"{statistics.fmean(pairs):+.1f}" if pairs else "–",
                _mean(mine, "one_shot", "mean"),
                who,
            ]
            lines.append("| " + " | ".join([*row, f"{len(mine)}" + (f", {stopped} stopped" if stopped else "")]) + " |")
    return "\n".join(lines)


def _mean(cells: list[dict[str, Any]], what: str, which: str) -> str:
    found = [cell[what][which] for cell in cells if what in cell]
    return f"{statistics.fmean(found):.1f}" if found else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where cells, adapters and replies are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/poisoning"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cells = [Cell(arm, attack, seed) for seed in asked.seeds for arm in asked.only for attack in ATTACKS]
    for cell in (cell for cell in cells if cell.possible):
        path = asked.work / "cells" / f"{cell.name}.json"
        if not path.exists():
            write_json(path, measured(cell, asked.work))
            print(cell.name, read_json(path, "a cell"), flush=True)
    found = [read_json(path, "a cell") for path in sorted((asked.work / "cells").glob("*.json"))]
    machine = f"{platform.machine()}, one core, torch {torch.__version__}"
    command = f"python benchmarks/poisoning.py --work {asked.work.name} --seeds {' '.join(map(str, asked.seeds))}"
    date = datetime.now(UTC).date().isoformat()
    write_json(asked.out.with_suffix(".json"), {"machine": machine, "date": date, "command": command, "cells": found})
    text = (
        f"`{command}`. {machine}, {date}. digits4, five rounds; accuracy of the final global model on the tests of the "
        "honest sites, mean over seeds. The poisoned site goes round with the seed. “Against left out” is the difference "
        "to a run without the poisoned site, seed by seed; for attacks of which only the warm start is measured, that of "
        "the warm starts. Krum against one faulty site needs five answers; here it has f = 0. “Set aside” counts the runs "
        "in which the poisoned site was set aside or left out of a round."
    )
    page = f"# One poisoned site of four\n\n{textwrap.fill(text, 116, break_on_hyphens=False)}\n\n{table(found)}\n"
    atomic_write(asked.out.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
