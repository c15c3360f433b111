"""The only round loop."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from .core import Algorithm, Exchange, Failure, Metrics, Reply, Round, ServerContext, ServerState, Stage, Transport
from .core.admission import DEFAULT_ADMISSION, AdmissionPolicy
from .core.messages import Message
from .core.rng import stream
from .utils.errors import InputError


def cohort(stage: Stage, sites: Sequence[str], rng: torch.Generator) -> list[str]:
    """The sites that a stage asks: all, or a share of them drawn from `rng`; sorted by name."""
    if stage.client is None:
        return []
    count = max(1, round(stage.client_fraction * len(sites)))
    return sorted(sites[i] for i in torch.randperm(len(sites), generator=rng)[:count].tolist())


def run(
    algorithm: Algorithm,
    central: ServerContext,
    transport: Transport,
    seed: int = 0,
    *,
    start: tuple[int, ServerState] | None = None,
    evaluate: str = "every",
    admission: AdmissionPolicy = DEFAULT_ADMISSION,
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
    done, server = start or (0, algorithm.init(replace(central, rng=stream(seed, "init"))))
    plan = algorithm.stages()
    counts = Counter(stage.name for stage in plan[:done])
    for step, stage in list(enumerate(plan))[done:]:
        began, number = time.perf_counter(), counts[stage.name]
        counts[stage.name] += 1
        asked = cohort(stage, sites, stream(seed, stage.name, number, "cohort"))
        answers: dict[str, Reply[Message] | Failure] = {}
        exchanges: list[Exchange] = []
        broadcast = stage.broadcast or algorithm.broadcast
        sent = {s: broadcast(server, s) for s in asked}
        for site, answer, crossed in transport.send(step, stage.name, number, sent):
            answers[site] = admission.admit(answer, site, sent[site], stage, central)
            exchanges += crossed
        replies, absent = admission.exclude_outliers(answers, sent, stage)
        if len(replies) < admission.needed(len(asked)):
            told = "; ".join(f"site {site!r}: {reason}" for site, reason in absent.items())
            raise InputError(
                f"{len(replies)} of {len(asked)} sites gave a usable answer to stage {stage.name} {number + 1}, "
                f"{admission.needed(len(asked))} are needed ({told}); mend them and resume, or set server.min_sites lower"
            )
        server, aggregate = stage.server(server, replies, replace(central, rng=stream(seed, stage.name, number, "server")))
        admission.check_state(server, f"{stage.name} {number + 1}")
        last = step == len(plan) - 1
        measured = (evaluate == "every" and (stage.evaluated or last)) or (evaluate == "last" and last)
        evaluation: Mapping[str, Mapping[str, Metrics]] = {}
        if measured:
            model = algorithm.global_model(server)
            views = transport.evaluate({s: algorithm.broadcast(server, s) for s in sites}, model)
            evaluation, unmeasured = admission.admit_metrics(views, model, central)
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
            share=admission.max_weight_share,
        )
