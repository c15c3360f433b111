"""Generative algorithms: the parts that are sent, their bits, their routes and the width of the network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy

from warmfed.algorithms import Smoothed, entry
from warmfed.algorithms.fedavg import FedAvg
from warmfed.algorithms.fedddpm import FedDDPM
from warmfed.algorithms.feddiffuse import PARTS, TRAVELS, FedDiffuse
from warmfed.algorithms.feddm_quant import FedDMQuant, Quantized, quantize, restore
from warmfed.algorithms.fedphd import FedPhD, homogeneity
from warmfed.algorithms.pdfed import PDFed
from warmfed.algorithms.shared.base import Model
from warmfed.core import Reply
from warmfed.core.messages import encode
from warmfed.core.rng import stream
from warmfed.core.tensors import mean
from warmfed.diffusion import pruning
from warmfed.diffusion.networks import noise_scheduler
from warmfed.run import run
from warmfed.runs.execute import execute
from warmfed.runs.synthesize import synthesize
from warmfed.tasks.denoising import Denoise
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

TASK = toy.DRAWING
UNET = replace(TASK, settings=replace(TASK.settings, denoiser="unet"))
START = TASK.init(stream("start"))
ALL = tuple(toy.SITES)


def play(algorithm: Any, **changes: Any) -> toy.Outcome:
    return toy.play(algorithm, task=TASK, **changes)


@pytest.fixture(scope="module")
def plain() -> toy.Outcome:
    return play(FedAvg(rounds=2, local=toy.LEARNING))


# FedDiffuse


def size(task: Denoise, parts: tuple[str, ...]) -> int:
    return sum(value.nbytes for name, value in task.init(stream(0)).items() if task.part(name) in parts)


def crossed(algorithm: Any) -> dict[str, list[tuple[int, int]]]:
    """By stage, bytes of tensors down and up of each exchange."""
    tap = toy.Tap(InProcess(toy.workers(algorithm, task=TASK)))
    list(run(algorithm, toy.central(task=TASK), tap, evaluate="never"))
    found: dict[str, list[tuple[int, int]]] = {}
    for stage, _, down, _, reply in tap.seen:
        up = sum(value.nbytes for value in getattr(reply.message, "model", {}).values())
        found.setdefault(stage, []).append((sum(value.nbytes for value in down.model.values()), up))
    return found


def test_full_is_fedavg_bit_for_bit(plain: toy.Outcome) -> None:
    full = play(FedDiffuse(rounds=2, local=toy.LEARNING))
    assert toy.same(full.model, plain.model)


@pytest.mark.parametrize("exchange", ["full", "ulatdec", "udec"])
def test_the_bytes_are_those_of_the_parts_that_travel(exchange: str) -> None:
    moved = crossed(FedDiffuse(rounds=2, local=toy.LEARNING, exchange=exchange))
    travels, whole = size(TASK, TRAVELS[exchange]), size(TASK, PARTS)
    assert moved["train"] == [(travels, travels)] * 8
    assert moved.get("start", []) == ([] if exchange == "full" else [(whole, 0)] * 4)


def test_usplit_has_each_half_of_a_pair_once() -> None:
    """Of four sites two return encoders and two decoders; two of them, one of each pair, the bottleneck, too."""
    algorithm = FedDiffuse(rounds=2, local=toy.LEARNING, exchange="usplit")
    server = algorithm.init(toy.central(task=TASK))
    assert (len(server.encoder), len(server.bottleneck), len(server.decoder)) == (2, 2, 2)
    assert set(server.encoder) | set(server.decoder) == set(ALL)
    moved = crossed(algorithm)["train"]
    assert {down for down, _ in moved} == {size(TASK, PARTS)}
    assert sum(up for _, up in moved) == 2 * 2 * size(TASK, PARTS)  # two rounds, half of what FULL sends


def test_usplit_averages_a_part_over_those_who_return_it() -> None:
    algorithm = FedDiffuse(exchange="usplit")
    server = replace(algorithm.init(toy.central(task=TASK)), encoder=("a", "b"), bottleneck=("a", "c"), decoder=("c", "d"))
    replies = {
        site: Reply(Model({name: torch.full_like(value, i) for name, value in START.items()}), None, 1.0, {})
        for i, site in enumerate(ALL)
    }
    merged, _ = algorithm.aggregate(server, replies, toy.central(task=TASK))
    means = {"encoder": 0.5, "bottleneck": 1.0, "decoder": 2.5}
    for name, value in merged.model.items():
        assert torch.equal(value, torch.full_like(value, means[TASK.part(name)]))


def test_a_site_without_a_partner_returns_the_bottleneck_and_a_half_and_one_alone_everything() -> None:
    algorithm = FedDiffuse(exchange="usplit")
    three = algorithm.init(toy.central(task=TASK, sites=dict.fromkeys("abc")))
    assert sorted([*three.encoder, *three.decoder]) == list("abc")
    assert len(three.bottleneck) == 2  # one of the pair, and the one without a partner
    one = algorithm.init(toy.central(task=TASK, sites={"a": None}))
    assert (one.encoder, one.bottleneck, one.decoder) == (("a",), ("a",), ("a",))


@pytest.mark.parametrize("task", [TASK, UNET], ids=["dit", "unet"])
def test_every_part_has_tensors_and_the_halves_of_a_network_are_alike(task: Denoise) -> None:
    assert all(size(task, (part,)) for part in PARTS)


def test_the_parts_of_a_deep_transformer() -> None:
    deep = replace(TASK, settings=replace(TASK.settings, depth=6))
    parts = [deep.part(f"net.transformer_blocks.{i}.ff.net.2.weight") for i in range(6)]
    assert parts == ["encoder"] * 2 + ["bottleneck"] * 2 + ["decoder"] * 2


def test_sites_begin_with_one_model_and_keep_their_own_encoder() -> None:
    outcome = play(FedDiffuse(rounds=1, local=toy.LEARNING, exchange="udec"))
    first = outcome.after("start", 0)
    assert {TASK.part(name) for name in first.server.model} == {"decoder"}
    a, b = outcome.personal("a"), outcome.personal("b")
    assert a.keys() == START.keys()
    same = {TASK.part(name): torch.equal(a[name], b[name]) for name in a if name.endswith("bias")}
    assert same == {"encoder": False, "bottleneck": False, "decoder": True}


def test_a_reply_without_a_tensor_is_refused() -> None:
    algorithm, ctx = FedDiffuse(), toy.central(task=TASK)
    missing = {name: value for name, value in START.items() if name != "net.proj_out_1.bias"}
    with pytest.raises(InputError, match=r"tensor 'net\.proj_out_1\.bias' is missing"):
        algorithm.check(Reply(Model(missing), None, 1.0, {}), "a", ctx)
    with pytest.raises(InputError, match=r"is float32 \[3\], expected float32 \[64\]"):
        algorithm.check(Reply(Model({**START, "net.proj_out_1.bias": torch.zeros(3)}), None, 1.0, {}), "a", ctx)


# FedDM-quant


def test_without_bits_it_is_fedavg_bit_for_bit(plain: toy.Outcome) -> None:
    assert toy.same(play(FedDMQuant(rounds=2, local=toy.LEARNING, bits=0)).model, plain.model)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rounding_is_within_a_step_and_right_in_the_mean(bits: int) -> None:
    values = torch.tensor([-1.0, -0.4, 0.1, 0.25, 2.0])
    rng = stream("rounding")
    drawn = []
    for _ in range(400):
        codes, grid = quantize(values, bits, rng)
        assert codes.dtype == torch.uint8
        assert len(codes) == -(-5 * bits // 8)
        drawn.append(restore(codes, grid, bits, values))
        assert grid[1].item() == pytest.approx(3 / (2**bits - 1))
        assert ((drawn[-1] - values).abs() <= grid[1] + 1e-6).all()
    assert torch.allclose(torch.stack(drawn).mean(0), values, atol=0.2 * 3 / (2**bits - 1))


def test_a_tensor_of_one_value_is_exact() -> None:
    values = torch.full((3, 2), -0.7)
    assert torch.equal(restore(*quantize(values, 4, stream(0)), 4, values), values)


def test_the_wire_carries_the_small_bytes(plain: toy.Outcome) -> None:
    outcome = play(FedDMQuant(rounds=1, local=toy.LEARNING, bits=4))
    full, few = (next(e for e in o.rounds[0].exchanges if e.direction == "up") for o in (plain, outcome))
    names = len(START)
    body = sum(-(-value.numel() // 2) + 8 for value in START.values())
    assert few.kind == "quantized.Quantized"
    assert body < few.bytes < body + 350 * names
    assert few.bytes < full.bytes / 4


def test_codes_of_another_size_are_refused() -> None:
    algorithm, ctx = FedDMQuant(bits=8), toy.central(task=TASK)
    packed = {name: quantize(value, 8, stream(0)) for name, value in START.items()}
    codes, grids = ({name: pair[i] for name, pair in packed.items()} for i in (0, 1))
    algorithm.check(Reply(Quantized(codes, grids, {}), None, 1.0, {}), "a", ctx)
    codes["net.proj_out_1.bias"] = codes["net.proj_out_1.bias"][:-1]
    with pytest.raises(InputError, match="for the model's change in 8 bits"):
        algorithm.check(Reply(Quantized(codes, grids, {}), None, 1.0, {}), "a", ctx)
    with pytest.raises(InputError, match="bits must be one of 0, 1, 2, 4, 8; got 3"):
        FedDMQuant(bits=3)


# FedPhD


def test_one_edge_that_trusts_all_alike_is_fedavg_bit_for_bit(plain: toy.Outcome) -> None:
    flat = play(FedPhD(rounds=2, local=toy.LEARNING, edges=1, trust=0.0, pruned=0.0))
    assert toy.same(flat.model, plain.model)


def test_homogeneity() -> None:
    assert homogeneity(torch.tensor([5.0, 5.0, 5.0, 5.0])) == 1
    assert homogeneity(torch.tensor([8.0, 0.0, 0.0, 0.0])) == 0.25
    assert homogeneity(torch.tensor([4.0, 4.0, 0.0, 0.0])) == 0.5


def test_sites_join_the_edge_that_lacks_their_classes() -> None:
    """Two sites of class 0 and two of class 1: each edge has one of either, in whatever order they come."""
    algorithm = FedPhD(edges=2)
    labels = {site: torch.tensor([10.0, 0.0]) if site in "ab" else torch.tensor([0.0, 10.0]) for site in ALL}
    for seed in range(6):
        ctx = replace(toy.central(task=TASK), rng=stream(seed))
        joined = algorithm.joined(replace(algorithm.init(ctx), labels=labels), ctx)
        assert [len(sites) for sites in joined.members.values()] == [2, 2]
        assert all(homogeneity(sum(sites.values())) == 1 for sites in joined.members.values())


def test_the_cloud_weighs_edges_by_images_and_evenness() -> None:
    algorithm = FedPhD(edges=2, period=5, trust=2.0, pruned=0.0)
    labels = {"a": torch.tensor([6.0, 0.0]), "b": torch.tensor([1.0, 1.0])}
    server = replace(
        algorithm.init(toy.central(task=TASK)),
        edges={"x": START, "y": START},
        members={"x": {"a": labels["a"]}, "y": {"b": labels["b"]}},
    )
    models = {site: {name: torch.full_like(v, i) for name, v in START.items()} for i, site in enumerate("ab")}
    replies = {site: Reply(Model(models[site]), None, float(labels[site].sum()), {}) for site in "ab"}
    merged, metrics = algorithm.aggregate(server, replies, toy.central(task=TASK))
    expected = mean([(models["a"], 6 * 0.25), (models["b"], 2 * 1.0)])
    assert toy.same(merged.model, expected)
    assert toy.same(algorithm.broadcast(merged, "a").model, models["a"])  # between the cloud's rounds an edge has its own
    assert metrics["homogeneity/x"] == 0.5


def test_the_pruned_network_is_smaller_and_so_are_its_messages() -> None:
    outcome = play(FedPhD(rounds=3, local=toy.LEARNING, dense=1, pruned=0.5))
    models = [Model(outcome.algorithm.global_model(r.server)) for r in outcome.rounds[:2]]
    before, after = (len(encode(model)) for model in models)
    assert after < before
    ups = [next(e.bytes for e in r.exchanges if e.direction == "up") for r in outcome.rounds if r.stage == "train"]
    assert ups == [before, after, after]
    assert [name for name in START if START[name].shape != outcome.model[name].shape] == [
        "net.transformer_blocks.0.ff.net.0.proj.weight",
        "net.transformer_blocks.0.ff.net.0.proj.bias",
        "net.transformer_blocks.0.ff.net.2.weight",
    ]
    assert outcome.model["net.transformer_blocks.0.ff.net.2.weight"].shape == (32, 64)


@pytest.mark.parametrize("task", [TASK, UNET], ids=["dit", "unet"])
def test_units_without_weight_go_first_and_are_not_missed(task: Denoise) -> None:
    """A network whose last half of each block's units is zero predicts the same without them."""
    model = {name: value + 0.05 for name, value in task.init(stream("prune")).items()}
    for prefix, kind in pruning.blocks(model).items():
        for name, axis in kind.items():
            units = model[f"{prefix}.{name}"].movedim(axis, 0)
            groups = 8 if kind is pruning.RESIDUAL else 1
            units.view(groups, -1, *units.shape[1:])[:, units.shape[0] // groups // 2 :] = 0
    if kind is pruning.RESIDUAL:
        # a group's statistics are of the channels that are left, so here the prediction is another one
        small = task.pruned(model, 0.5)
        assert all(units * 2 == dict(pruning.widths(model))[prefix] for prefix, units in pruning.widths(small))
        assert torch.equal(small["net.conv_in.weight"], model["net.conv_in.weight"])
        assert all((pruning.norms(small, prefix) > 0).all() for prefix in pruning.blocks(small))
        task.metrics(small, task.encoded(toy.SITES["a"]["test"]))
        return
    small, table = task.pruned(model, 0.5), task.encoded(toy.SITES["a"]["test"])
    assert task.metrics(small, table)["loss"] == pytest.approx(task.metrics(model, table)["loss"], rel=1e-5)


def test_a_pruned_run_s_model_can_be_drawn_from(tmp_path: Path) -> None:
    data = tiny.arrays(tmp_path / "data.npz")
    changes = {
        "algorithm.name": "fedphd", "algorithm.rounds": 1, "algorithm.dense": 1, "algorithm.local.epochs": 1, "task": "denoise",
        "denoising.latent": "", "denoising.width": 32, "denoising.depth": 1, "denoising.steps": 2, "evaluation.samples": 0,
    }  # fmt: skip
    settings = {key: value for key, value in tiny.SETTINGS.items() if not key.startswith(("algorithm", "model"))}
    execute(tiny.parse(None, settings | {"data.source": str(data)} | changes), tmp_path / "run")
    found = synthesize(tmp_path / "run", count=1, out=tmp_path / "images.safetensors")
    assert found["images"] == 3


# PDFed


def test_a_site_goes_on_from_the_model_that_scores_best() -> None:
    algorithm = PDFed(rounds=2, local=toy.LEARNING, samples=12)
    outcome = play(algorithm)
    board = algorithm.broadcast(outcome.after("train", 0).server, "a")
    worker = toy.workers(algorithm, task=TASK)["a"]
    scores = algorithm.scores(board, worker.local("train", 1))
    best = min(scores, key=lambda site: scores[site])
    last = outcome.after("train", 1)
    assert last.train["a"]["score"] == scores[best]
    assert last.train["a"]["own"] == (best == "a")
    votes = {name: count for name, count in last.aggregate.items() if name.startswith("votes/")}
    assert sum(votes.values()) == 4
    assert votes[f"votes/{best}"] >= 1
    assert algorithm.global_model(last.server) is None
    assert toy.same(outcome.personal("a"), last.server.models["a"])


def test_nothing_is_averaged() -> None:
    """Of one site alone, each round goes on from its own model."""
    sites = {"a": toy.SITES["a"]}
    one = play(PDFed(rounds=2, local=toy.LEARNING, samples=12), sites=sites)
    assert toy.same(one.server.models["a"], play(FedAvg(rounds=2, local=toy.LEARNING), sites=sites).model)


# the auxiliary set alone, averages over rounds, Tun et al.


def test_the_auxiliary_set_alone_is_training_on_it_and_nothing_else() -> None:
    outcome = play(FedDDPM(rounds=1, local=toy.LEARNING, first=toy.LEARNING, correct="only", share=0.5))
    assert [r.stage for r in outcome.rounds] == ["local", "auxiliary", "alone"]
    assert outcome.rounds[-1].cohort == ()
    ups = [e for r in outcome.rounds[1:] for e in r.exchanges]
    assert ups == []
    table = outcome.server.auxiliary
    assert TASK.metrics(outcome.model, table)["loss"] < 0.9 * TASK.metrics(START, table)["loss"]


def test_the_average_over_rounds_leaves_the_rounds_as_they_were(plain: toy.Outcome, tmp_path: Path) -> None:
    smooth = play(Smoothed(plain.algorithm, 0.5))
    first, second = (plain.algorithm.global_model(r.server) for r in plain.rounds)
    start = plain.algorithm.init(replace(toy.central(task=TASK), rng=stream(0, "init"))).model
    assert toy.same(smooth.server.inner.model, second)
    for name, value in smooth.model.items():
        once = torch.lerp(first[name], start[name], 2 / 11)
        assert torch.equal(value, torch.lerp(second[name], once, 3 / 12))
    border = smooth.rounds[0].server
    resumed = play(Smoothed(plain.algorithm, 0.5), start=(1, border))
    assert encode(resumed.server) == encode(smooth.server)


def test_an_average_needs_a_global_model() -> None:
    with pytest.raises(InputError, match="global_ema_decay needs an algorithm"):
        play(Smoothed(PDFed(), 0.9))


def test_tun_is_fedavg_with_a_recipe() -> None:
    assert entry("fedavg-tun").cls is FedAvg
    recipe = entry("fedavg-tun").settings
    settings = {key.removeprefix("denoising."): value for key, value in recipe.items() if key.startswith("denoising.")}
    task = replace(TASK, settings=replace(TASK.settings, **settings, times=50))
    t = torch.arange(1, 51).double() / 50
    log_snr = -torch.log(torch.expm1(1e-4 + 10 * t.square()))
    assert torch.allclose(noise_scheduler(task.settings).alphas_cumprod.double(), log_snr.sigmoid(), atol=2e-4)
