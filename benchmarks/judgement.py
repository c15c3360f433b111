"""Whether the check of adapters finds a site with wrong labels, and leaves honest sites alone, on real images.

The sites' own training images stand in the place of samples, 80 a class at most: how far apart the sites look is then that
of the data, and no generator is needed. One site after another has all of its labels rolled, then half of them.

    python benchmarks/judgement.py [CONFIG.toml] [--set KEY=VALUE …]
"""

import argparse
from pathlib import Path

import torch

from warmfed.algorithms.shared.adapter_screening import suspects
from warmfed.algorithms.shared.synthetic_data import Synthesis
from warmfed.config import parse, setting
from warmfed.core.tensors import Table, join, select
from warmfed.runs.prepare import load_data

PER_CLASS = 80


def rolled(table: Table, share: float) -> Table:
    """The table with the labels of this share of its classes, two at least, rolled by one among them."""
    classes = table["label"].unique()
    part = classes[: max(2, round(share * len(classes)))]
    turned = table["label"].clone()
    for old, new in zip(part, part.roll(1), strict=True):
        turned[table["label"] == old] = new
    return {**table, "label": turned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    federation = load_data(parse(asked.config, dict(map(setting, asked.set))).data)
    sites, limit = tuple(federation.sites), Synthesis().contradicted
    tables: list[Table] = []
    for i, site in enumerate(federation.sites.values()):
        label = site.train["label"]
        some = torch.cat([(label == c).nonzero()[:PER_CLASS, 0] for c in label.unique()])
        tables.append({**select(site.train, some), "site": torch.full((len(some),), i)})
    print(f"{federation.name}: honest sites set aside: {suspects(join(tables), sites, limit)[0] or 'none'}")
    for share in (1.0, 0.5):
        found, wrongly = 0, 0
        for i, name in enumerate(sites):
            lying = [rolled(table, share) if i == j else table for j, table in enumerate(tables)]
            aside = suspects(join(lying), sites, limit)[0]
            found, wrongly = found + (name in aside), wrongly + len(set(aside) - {name})
        print(f"  {share:.0%} of the labels rolled: {found} of {len(sites)} found, {wrongly} honest sites set aside")


if __name__ == "__main__":
    main()
