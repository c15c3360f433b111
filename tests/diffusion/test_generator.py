"""The embedded base with two sites of digits4: an adapter samples images of its own site."""

from collections.abc import Mapping

import pytest
import torch

from warmfed.core import ClientContext, ServerContext
from warmfed.core.rng import stream
from warmfed.core.tensors import Tensors
from warmfed.core.training import Training
from warmfed.data import digits4
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.fit import fit
from warmfed.tasks import Classify

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
FEDERATION, TASK = digits4(), Classify((3, 32, 32), 10)
SITES = ("ink", "paper")
GENERATOR = LatentDiffusion(
    training=Training(optimizer="adamw", lr=1e-2, epochs=4, batch_size=32, schedule="cosine", warmup=5, max_grad_norm=1.0)
)
LABELS = torch.arange(60) % 10


def local(site: str) -> ClientContext:
    return ClientContext(TASK, FEDERATION.sites[site].splits, stream("sites", site), site, FEDERATION.prompts, GENERATOR)


@pytest.fixture(scope="module")
def recognised() -> Mapping[tuple[str, str], float]:
    """Return by (site of the classifier, site of the adapter) the share of samples classified as their class."""
    training = Training(lr=0.02, epochs=25, max_grad_norm=1.0)
    judges: dict[str, Tensors] = {}
    for site in SITES:
        ctx = local(site)
        judges[site], _ = fit(ctx, TASK.init(stream("judge")), training, ctx.data["train"])
    found = {}
    for drawer in SITES:
        adapter, _ = GENERATOR.adapt(local(drawer))
        image = GENERATOR.synthesize(adapter, FEDERATION.prompts, LABELS, ServerContext(None, stream("draw")))
        for judge in SITES:
            right = TASK.predict(judges[judge], {"image": image}).argmax(1) == LABELS
            found[judge, drawer] = right.double().mean().item()
    return found


def test_an_adapter_draws_its_sites_classes(recognised: Mapping[tuple[str, str], float]) -> None:
    assert min(recognised[site, site] for site in SITES) > 0.35  # chance: 0.1; the judges have seen 225 images


def test_swapping_two_sites_adapters_lowers_own_site_recognition(recognised: Mapping[tuple[str, str], float]) -> None:
    for site, other in (SITES, SITES[::-1]):
        assert recognised[site, other] < recognised[site, site] - 0.2
