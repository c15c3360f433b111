"""Gather CIFAR-10's lossless images, 1,000 to a PNG whose rows are 32×32 pixels, with their labels in one .npz file.

python benchmarks/cifar10.py cifar10/lossless_4000 --out runs/cifar10.npz
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of cifar10_batch_*.png and labels.npy")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    batches = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(asked.source.glob("cifar10_batch_*.png"))]
    images = np.concatenate(batches).reshape(-1, 32, 32, 3)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(asked.out, x=images, y=np.load(asked.source / "labels.npy", allow_pickle=False), classes=np.array(CLASSES))
    print(f"{len(images):,} images -> {asked.out}")


if __name__ == "__main__":
    main()
