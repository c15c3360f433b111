"""The round loop. No other module runs stages."""

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
    """Return the sites of a stage, sorted by name: all, or a share drawn from `rng`; empty for a stage without client."""
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
    """Run an algorithm's stages in order; yield a `Round` after each.

    Args:
        algorithm: the algorithm.
        central: context of the server functions; each stage replaces its `rng`.
        transport: connection to the clients.
        seed: seed of all random streams.
        start: (stages already done, the server's state then), to resume a run.
        evaluate: "every" (each stage that may change a model), "last" or "never".
        admission: checks of the replies, and the number of replies that a stage needs.

    Yields:
        The record of each stage.

    Raises:
        InputError: Fewer sites than needed gave a valid reply; the stage is discarded.
    """
    sites = transport.sites
    done, server = start or (0, algorithm.init(replace(central, rng=stream(seed, "init"))))
    plan = algorithm.stages()
    counts = Counter(stage.name for stage in plan[:done])
    for step, stage in list(enumerate(plan))[done:]:
        began, number = time.perf_counter(), counts[stage.name]
        counts[stage.name] += 1
        selected = cohort(stage, sites, stream(seed, stage.name, number, "cohort"))
        answers: dict[str, Reply[Message] | Failure] = {}
        exchanges: list[Exchange] = []
        broadcast = stage.broadcast or algorithm.broadcast
        sent = {s: broadcast(server, s) for s in selected}
        for site, answer, crossed in transport.send(step, stage.name, number, sent):
            answers[site] = admission.admit(answer, site, sent[site], stage, central)
            exchanges += crossed
        replies, absent = admission.exclude_outliers(answers, sent, stage)
        if len(replies) < admission.needed(len(selected)):
            reasons = "; ".join(f"site {site!r}: {reason}" for site, reason in absent.items())
            raise InputError(
                f"{len(replies)} of {len(selected)} sites gave a valid reply to stage {stage.name} {number + 1}, "
                f"{admission.needed(len(selected))} are needed ({reasons}); fix them and resume, or lower server.min_sites"
            )
        server, aggregate = stage.server(server, replies, replace(central, rng=stream(seed, stage.name, number, "server")))
        admission.check_state(server, f"{stage.name} {number + 1}")
        last = step == len(plan) - 1
        evaluate_now = (evaluate == "every" and (stage.evaluated or last)) or (evaluate == "last" and last)
        evaluation: Mapping[str, Mapping[str, Metrics]] = {}
        if evaluate_now:
            model = algorithm.global_model(server)
            views = transport.evaluate({s: algorithm.broadcast(server, s) for s in sites}, model)
            evaluation, unmeasured = admission.admit_metrics(views, model, central)
            absent = dict(sorted((unmeasured | absent).items()))
        yield Round(
            step=step,
            stage=stage.name,
            number=number,
            server=server,
            cohort=tuple(selected),
            train={site: reply.metrics for site, reply in replies.items()},
            aggregate=aggregate,
            evaluation=evaluation,
            exchanges=tuple(sorted(exchanges, key=lambda e: (e.direction, e.site))),
            seconds=time.perf_counter() - began,
            absent=absent,
            share=admission.max_weight_share,
        )
