"""Does training from the memory-mapped feature store cost what training from tensors in memory costs?

    python benchmarks/feature_loading.py
    python benchmarks/feature_loading.py --count 100000 --rounds 9 --json benchmarks/results/feature_loading_cpu.json

Random labelled features (posterior moments of latents 4x16x16) are written to a store. Each round trains the same small DiT for --steps steps from each
source in turn, in this one process, and then draws as many batches without training; a source is compared with the fixed latents of its own round, so a
machine whose speed drifts slows all alike. Shown is the median over the rounds. The store has just been written, so the system still holds its pages, as
it does from the second epoch on where the store fits into memory.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import DIT_CONFIGS, build_dit
from tstitch.cli import new_parser, parse_device, positive_int, run
from tstitch.data import FeatureStore, FeatureWriter
from tstitch.diffusion import create_diffusion
from tstitch.files import write_json
from tstitch.results import markdown_table
from tstitch.tune import wait_for

LATENT_SHAPE, NUM_CLASSES = (4, 16, 16), 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--count", type=positive_int, default=100_000, help="features in the store, 4 KB each")
    parser.add_argument("--model", choices=DIT_CONFIGS, default="emoji-small", help="model that is trained")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="items a step")
    parser.add_argument("--steps", type=positive_int, default=30, help="steps for each source in a round")
    parser.add_argument("--rounds", type=positive_int, default=7, help="rounds after one that warms up")
    parser.add_argument("--folder", type=Path, help="where the store is written for a while (default: the system's temporary folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--json", type=Path, help="write the figures here too")
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
    device = parse_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, device, write_random_store(Path(folder), args.count))


def measure(args: argparse.Namespace, device: torch.device, store: FeatureStore) -> None:
    """Train from each source in turn, many times over."""
    in_memory = copy.copy(store)
    in_memory.moments = np.array(store.moments)
    fixed = torch.cat([store.latents(items) for items in torch.arange(args.count).split(5000)])
    sources = {"fixed latents in memory": fixed.__getitem__, "moments in memory": in_memory.latents, "memory-mapped store": store.latents}
    train = trainer(args, device)

    def nothing(x_0: Tensor, y: Tensor) -> None:
        """Draw alone."""

    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for _ in tqdm(range(args.rounds + 1), desc="rounds", unit="round"):
        for name, latents in sources.items():
            rates[name].append(tuple(steps_per_second(args, device, store.labels, latents, act) for act in (train, nothing)))
    rates = {name: measured[1:] for name, measured in rates.items()}

    baseline = rates["fixed latents in memory"]
    rows = [
        {
            "source": name,
            "steps_per_s": statistics.median(trained for trained, _ in measured),
            "draws_per_s": statistics.median(args.batch_size * drawn for _, drawn in measured),
            "relative": statistics.median(ours[0] / theirs[0] for ours, theirs in zip(measured, baseline, strict=True)),
            "of_rounds": [ours[0] / theirs[0] for ours, theirs in zip(measured, baseline, strict=True)],
        }
        for name, measured in rates.items()
    ]
    cells = [[row["source"], f"{row['steps_per_s']:.2f}", f"{row['relative']:.3f}", f"{row['draws_per_s']:,.0f}"] for row in rows]
    print(markdown_table(["source", "training steps/s", "relative", "items/s drawn without training"], cells))
    print(f"{args.count} features, {args.model}, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads")
    if args.json:
        settings = {key: getattr(args, key) for key in ("count", "model", "batch_size", "steps", "rounds")}
        write_json(args.json, {**settings, "device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows})


def steps_per_second(
    args: argparse.Namespace, device: torch.device, labels: Tensor, latents: Callable[[Tensor], Tensor], act: Callable[[Tensor, Tensor], None]
) -> float:
    """Rate of `act` on random batches."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(args.steps):
        index = torch.randint(args.count, (args.batch_size,))
        act(latents(index), labels[index])
    wait_for(device)
    return args.steps / (time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
