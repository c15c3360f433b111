"""Features of images by a frozen body, computed once: rounds that train heads then take milliseconds."""

import hashlib
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.tensors import sha256
from ..data.image_cache import Cache
from ..models import Partial, pixels

_BATCH_PIXELS = 2**18
"""Pixels that the body takes at once: larger batches miss the processor's caches and take twice the time."""
_KNOWN: MutableMapping[Tensor, dict[str, Tensor]] = WeakTensorKeyDictionary()
"""Features by image tensor of this process and digest of the body: a table's digest is computed once."""


def frozen_features(net: Partial, digest: str, image: Tensor) -> Tensor:
    """Return the features of uint8 images [n, c, h, w] by the body of a network, float [n, width], memory-mapped.

    They are kept in the user's cache folder, in a file whose name is the digest of images and body.

    Args:
        net: the network, in evaluation mode.
        digest: SHA-256 of its frozen part.
        image: the images.
    """
    known = _KNOWN.setdefault(image, {})
    if digest not in known:
        known[digest] = _kept(net, digest, image)
    return known[digest]


def _kept(net: Partial, digest: str, image: Tensor) -> Tensor:
    width = net.head.in_features
    batch = max(8, _BATCH_PIXELS // (image.shape[-2] * image.shape[-1]))
    layout: Any = torch.channels_last  # the fastest for convolutions
    body: Any = net.body
    body.to(memory_format=layout)

    def make(content: Any) -> None:
        done = 0
        with torch.inference_mode():
            for part in image.split(batch):
                found = body(pixels(part).contiguous(memory_format=layout)).contiguous()
                raw = found.numpy().view(np.uint8).reshape(-1)
                content[done : done + len(raw)] = raw
                done += len(raw)

    of = hashlib.sha256(f"{sha256({'image': image})} {digest} {batch}".encode()).hexdigest()
    kept = Cache().array(f"features-{of}", (4 * len(image) * width,), make)
    return torch.from_numpy(kept).view(torch.float32).reshape(len(image), width)
