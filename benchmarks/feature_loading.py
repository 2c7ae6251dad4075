"""Does training from the memory-mapped feature store cost what training from tensors in memory costs?

    python benchmarks/feature_loading.py

Random labelled features (posterior moments of latents 4x16x16) are written to a store. The same small DiT is trained for --steps steps from each source in
turn; after that as many batches are drawn without training. The store has just been written, so the system still holds its pages, as it does from the
second epoch on where the store fits into memory.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import Record, add_bench_args
from dit.checkpoints import DIT_CONFIGS, build_dit
from tstitch.cli import new_parser, positive_int, run
from tstitch.data import FeatureStore, FeatureWriter
from tstitch.diffusion import create_diffusion

LATENT_SHAPE, NUM_CLASSES = (4, 16, 16), 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--count", type=positive_int, default=100_000, help="features in the store, 4 KB each")
    parser.add_argument("--model", choices=DIT_CONFIGS, default="emoji-small", help="model that is trained")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="items a step")
    parser.add_argument("--steps", type=positive_int, default=30, help="steps that are timed together")
    parser.add_argument("--folder", type=Path, help="where the store is written for a while (default: the system's temporary folder)")
    add_bench_args(parser, rounds=7)
    return parser.parse_args(argv)


def write_random_store(folder: Path, count: int) -> FeatureStore:
    """A store of random means, unit variance, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    index = {"count": count, "mirrors": 1, "latent_shape": list(LATENT_SHAPE), "num_classes": NUM_CLASSES, "vae": "none", "scaling_factor": 1.0}
    writer = FeatureWriter(folder, index, labels)
    writer.begin()
    for items in tqdm(torch.arange(count).split(5000), desc="write", unit="chunk"):
        means = torch.randn(len(items), 1, *LATENT_SHAPE, generator=generator)
        writer.write(items.tolist(), torch.cat([means, torch.full_like(means, -4.0)], dim=2).numpy())
    writer.finish()
    return FeatureStore(folder)


def trainer(args: argparse.Namespace, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """A training step, called with latents and labels."""
    torch.manual_seed(0)
    model = build_dit(args.model, input_size=LATENT_SHAPE[-1], num_classes=NUM_CLASSES).to(device).train()
    optimizer, diffusion = torch.optim.AdamW(model.parameters(), lr=1e-4), create_diffusion("")

    def train(x_0: Tensor, y: Tensor) -> None:
        t, noise = torch.randint(diffusion.num_timesteps, y.shape), torch.randn(x_0.shape)
        x_0, y, t, noise = (value.to(device) for value in (x_0, y, t, noise))
        diffusion.training_losses(model, x_0, t, {"y": y}, noise=noise)["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def main(argv: list[str] | None = None) -> None:
    """Time, compare, print."""
    args = parse_args(argv)
    record = Record("feature_loading", args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(record, args, write_random_store(Path(folder), args.count))
    record.show()


def measure(record: Record, args: argparse.Namespace, store: FeatureStore) -> None:
    """Train from each source in turn; then draw from each."""
    in_memory = copy.copy(store)
    in_memory.moments = np.array(store.moments)
    fixed = torch.cat([store.latents(items) for items in torch.arange(args.count).split(5000)])
    sources = {"fixed latents in memory": fixed.__getitem__, "moments in memory": in_memory.latents, "memory-mapped store": store.latents}

    def nothing(x_0: Tensor, y: Tensor) -> None:
        """Draw alone."""

    def steps(latents: Callable[[Tensor], Tensor], act: Callable[[Tensor, Tensor], None]) -> None:
        for _ in range(args.steps):
            index = torch.randint(args.count, (args.batch_size,))
            act(latents(index), store.labels[index])

    for case, act in (("training", trainer(args, record.device)), ("drawing alone", nothing)):
        comparison = record.compare({name: partial(steps, latents, act) for name, latents in sources.items()})
        record.add(
            f"{args.model}, {args.count} features, {case}",
            comparison,
            against={name: {"fixed latents": "fixed latents in memory"} for name in sources},
            settings={key: getattr(args, key) for key in ("count", "model", "batch_size", "steps")},
            notes={name: {"items/s": f"{args.steps * args.batch_size / comparison.median(name):,.0f}"} for name in sources},
        )


if __name__ == "__main__":
    run(main)
