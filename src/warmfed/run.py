"""The only round loop."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from .core import Absent, Algorithm, Central, Exchange, Metrics, Reply, Round, ServerState, Stage, Transport
from .core.admission import STRICT, Border
from .core.rng import named
from .utils.errors import InputError


def cohort(stage: Stage, sites: Sequence[str], rng: torch.Generator) -> list[str]:
    """The sites that a stage asks: all, or a share of them drawn from `rng`; sorted by name."""
    if stage.client is None:
        return []
    count = max(1, round(stage.sample * len(sites)))
    return sorted(sites[i] for i in torch.randperm(len(sites), generator=rng)[:count].tolist())


def run(
    algorithm: Algorithm,
    central: Central,
    transport: Transport,
    seed: int = 0,
    *,
    start: tuple[int, ServerState] | None = None,
    evaluate: str = "every",
    border: Border = STRICT,
) -> Iterator[Round]:
    """Run an algorithm's stages in order and yield after each; progress, logs, checkpoints and reports consume it.

    Args:
        central: what the server may see; its `rng` is replaced by each stage's own.
        start: (stages already done, the server's state then), to resume a run.
        evaluate: every (stage that may change a model), last (only), or never.
        border: which replies are taken, and how many a stage needs.

    Raises:
        InputError: fewer sites than needed have given a usable reply; nothing of this stage is kept.
    """
    sites = transport.sites
    done, server = start or (0, algorithm.init(replace(central, rng=named(seed, "init"))))
    plan = algorithm.stages()
    counts = Counter(stage.name for stage in plan[:done])
    for step, stage in list(enumerate(plan))[done:]:
        began, number = time.perf_counter(), counts[stage.name]
        counts[stage.name] += 1
        asked = cohort(stage, sites, named(seed, stage.name, number, "cohort"))
        answers: dict[str, Reply | Absent] = {}
        exchanges: list[Exchange] = []
        down = stage.down or algorithm.down
        sent = {s: down(server, s) for s in asked}
        for site, answer, crossed in transport.send(step, stage.name, number, sent):
            answers[site] = border.admit(answer, site, sent[site], stage, central)
            exchanges += crossed
        replies, absent = border.settle(answers, sent, stage)
        if len(replies) < border.needed(len(asked)):
            told = "; ".join(f"site {site!r}: {reason}" for site, reason in absent.items())
            raise InputError(
                f"{len(replies)} of {len(asked)} sites gave a usable answer to stage {stage.name} {number + 1}, "
                f"{border.needed(len(asked))} are needed ({told}); mend them and resume, or set border.least lower"
            )
        server, aggregate = stage.server(server, replies, replace(central, rng=named(seed, stage.name, number, "server")))
        border.sound(server, f"{stage.name} {number + 1}")
        last = step == len(plan) - 1
        measured = (evaluate == "every" and (stage.evaluated or last)) or (evaluate == "last" and last)
        evaluation: Mapping[str, Mapping[str, Metrics]] = {}
        if measured:
            model = algorithm.global_model(server)
            views = transport.evaluate({s: algorithm.down(server, s) for s in sites}, model)
            evaluation, unmeasured = border.measured(views, model, central)
            absent = dict(sorted((unmeasured | absent).items()))
        yield Round(
            step=step,
            stage=stage.name,
            number=number,
            server=server,
            cohort=tuple(asked),
            train={site: reply.metrics for site, reply in replies.items()},
            aggregate=aggregate,
            evaluation=evaluation,
            exchanges=tuple(sorted(exchanges, key=lambda e: (e.direction, e.site))),
            seconds=time.perf_counter() - began,
            absent=absent,
            share=border.share,
        )
