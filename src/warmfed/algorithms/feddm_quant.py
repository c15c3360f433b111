"""FedDM-quant: FedAvg of a diffusion model with quantized updates.

Vora, Bouacida, Krishnan, Mohapatra, "FedDM: Enhancing Communication Efficiency and Handling Data Heterogeneity in Federated
Diffusion Models", 2024, arXiv:2407.14730.

A site sends the change of its model. Each tensor becomes integers of a few bits and the step between them. FedDM-vanilla is
FedAvg on this task, FedDM-prox is FedProx.

Departures: only uploads are quantized. The grid is affine over each tensor's range. Rounding is stochastic, so that the
expectation equals the value (QSGD, Alistarh et al., NeurIPS 2017, arXiv:1610.02132). Codes of 1, 2 and 4 bits share a byte.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.messages import kind, message
from ..core.rng import fork
from ..core.tensors import Tensors, add, layout_mismatch, rows, sub
from ..core.training import Training
from ..fit import fit
from ..models import initial
from ..utils.errors import InputError
from .shared.base import DRAWING, Combined, Model, upload

BITS = (0, 1, 2, 4, 8)


@message("quantized.Quantized")
class Quantized:
    """A quantized change of the model; tensors that are not floating-point are sent as they are."""

    codes: Tensors  # uint8, 8/bits codes per byte
    grids: Tensors  # float32 [2]: lowest value and step
    plain: Tensors


def quantize(values: Tensor, bits: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return codes and grid: each value is rounded at random to a neighbouring grid point, and keeps its expectation.

    Returns:
        Codes, uint8 [ceil(n·bits/8)], and grid, float32 [2]: lowest value and step.
    """
    low = values.min()
    step = (values.max() - low) / (2**bits - 1)
    place = ((values.flatten() - low) / step if step > 0 else torch.zeros(values.numel())).double()
    number = (place + torch.rand(place.shape, generator=rng, dtype=torch.float64)).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    in_byte = 8 // bits
    number = torch.nn.functional.pad(number, (0, -len(number) % in_byte)).view(-1, in_byte)
    return (number << (bits * torch.arange(in_byte, dtype=torch.uint8))).sum(1, dtype=torch.uint8), torch.stack([low, step])


def restore(codes: Tensor, grid: Tensor, bits: int, like: Tensor) -> Tensor:
    """Return the values that `quantize` rounded to the grid, in the shape and dtype of `like`."""
    number = (codes[:, None] >> (bits * torch.arange(8 // bits, dtype=torch.uint8))) & (2**bits - 1)
    found: Tensor = (grid[0] + number.flatten()[: like.numel()] * grid[1]).to(like.dtype).view(like.shape)
    return found


@final
@dataclass(frozen=True)
class FedDMQuant(Combined[Model, Model, None, Quantized | Model]):
    """Run FedAvg with updates of a few bits."""

    local: Training = DRAWING
    """Local training in one round."""
    bits: int = 8
    """Bits per number: 8, 4, 2 or 1; 0: no quantization, which is FedAvg."""
    replies: ClassVar[tuple[type, ...]] = (Quantized, Model)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits must be one of {', '.join(map(str, BITS))}; got {self.bits}")

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Quantized | Model]:
        data, rng = ctx.data["train"], fork(ctx.rng, "quantize")
        model, metrics = fit(ctx, received.model, self.local, data)
        if not self.bits:
            return upload(model, state, ctx, metrics)
        floating = {name: value for name, value in model.items() if value.is_floating_point()}
        change = sub(floating, {name: received.model[name] for name in floating})
        packed = {name: quantize(value, self.bits, rng) for name, value in sorted(change.items())}
        sent = Quantized(
            {name: codes for name, (codes, _) in packed.items()},
            {name: grid for name, (_, grid) in packed.items()},
            {name: value for name, value in model.items() if name not in floating},
        )
        return Reply(sent, state, float(rows(data)), metrics)

    def check(self, reply: Reply[Quantized | Model], site: str, ctx: ServerContext) -> None:
        if type(reply.message) is not (Quantized if self.bits else Model):
            raise InputError(f"it sent {kind(type(reply.message))}, expected its change in {self.bits} bits")
        if not self.bits:
            return
        with torch.device("meta"):  # build shapes only, without weights
            model = initial(ctx.task.build())
            floating = {name: value.numel() for name, value in model.items() if value.is_floating_point()}
            codes = {name: torch.empty(-(-n * self.bits // 8), dtype=torch.uint8) for name, n in floating.items()}
            grids = {name: torch.empty(2) for name in floating}
        plain = {name: value for name, value in model.items() if name not in floating}
        sent = reply.message
        assert isinstance(sent, Quantized)
        if (
            wrong := layout_mismatch(sent.codes, codes)
            or layout_mismatch(sent.grids, grids)
            or layout_mismatch(sent.plain, plain)
        ):
            raise InputError(f"{wrong}, for the model's change in {self.bits} bits")

    def change(self, message: Quantized | Model, received: Model) -> Tensors:
        if isinstance(message, Model):
            return sub(message.model, received.model)
        return {
            f"model/{name}": restore(codes, message.grids[name].double(), self.bits, received.model[name].double())
            for name, codes in message.codes.items()
        }

    def aggregate(self, server: Model, replies: Replies[Quantized | Model], ctx: ServerContext) -> tuple[Model, Metrics]:
        restored = {site: replace(r, message=self._restored(server.model, r.message)) for site, r in replies.items()}
        return Model({**server.model, **self.robust.combine(server.model, restored)}), {}

    def _restored(self, start: Tensors, packed: Quantized | Model) -> Model:
        if isinstance(packed, Model):
            return packed
        known = {name: start[name] for name in start if name in packed.codes}
        change = {name: restore(packed.codes[name], packed.grids[name], self.bits, known[name]) for name in known}
        return Model({**add(known, change), **packed.plain})
