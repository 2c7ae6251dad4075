"""Every ratio of two models, or every mix of three, for the same pictures: ours against one plain run after another.

    python benchmarks/sweep.py                                                         # 11 ratios of DiT-S/2 and DiT-B/2, random weights
    python benchmarks/sweep.py --models emoji-small emoji-base emoji-large --parts 10  # all 66 mixes of the bundled models
    python benchmarks/sweep.py --models DiT-S/2 DiT-B/2 DiT-B/2 --parts 4 --num-steps 8

`plain` calls `sample` for each schedule with eager models. `ours` prepares the models for inference, which is timed too, and calls `sample_many`: what
schedules have in common is walked once, and branches at one step are one batch. `max diff` is the largest difference from plain fp32 over its largest value.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import random_dit
from benchmarks.record import Record, add_bench_args
from dit.checkpoints import DIT_CONFIGS, load_dit
from dit.inference import prepare_for_inference
from dit.models import DiT
from tstitch.cli import DTYPES, new_parser, positive_int, run
from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.presets import PRESETS
from tstitch.sampling import sample
from tstitch.schedule import three_way_allocations, two_way_ratios
from tstitch.solvers import DDIM
from tstitch.sweep import count_evaluations, sample_many


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=DIT_CONFIGS, default=["DiT-S/2", "DiT-B/2"], metavar="NAME", help="two or three, small to large")
    parser.add_argument("--parts", type=positive_int, default=10, help="shares are multiples of 1/PARTS")
    parser.add_argument("--num-images", type=positive_int, default=1, help="pictures of each schedule")
    parser.add_argument("--num-steps", type=positive_int, default=20, help="DDIM steps")
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance; 1 turns it off")
    parser.add_argument("--max-batch", type=positive_int, metavar="N", help="most pictures in one call of ours, before guidance (default: measured)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="number types of ours; plain is fp32")
    add_bench_args(parser, rounds=3)
    args = parser.parse_args(argv)
    if len(args.models) not in (2, 3):
        raise InputError(f"--models takes two or three names, got {len(args.models)}")
    return args


def load(name: str, seed: int) -> DiT:
    """A bundled model with its weights, or a published size with random ones."""
    bundled = {file.model: file.path for file in PRESETS["emoji"].denoisers}
    return load_dit(bundled[name], name) if name in bundled else random_dit(name, seed)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Time, write, print."""
    args = parse_args(argv)
    record = Record("sweep", args)
    models = [load(name, k).to(record.device) for k, name in enumerate(args.models)]
    schedules = two_way_ratios(args.parts) if len(models) == 2 else three_way_allocations(args.parts)
    solver, noise = DDIM(create_diffusion(f"ddim{args.num_steps}")), SampleNoise(range(args.num_images))
    x_T, y = noise.latents(models[0].latent_shape, record.device), noise.labels(models[0].num_classes).to(record.device)
    how = {"solver": solver, "guidance": ClassifierFreeGuidance(args.cfg_scale, models[0].num_classes)}

    def plain() -> list[Tensor]:
        return [sample(models, x_T, y, schedule=schedule, **how) for schedule in schedules]

    def ours(typed: list[DiT]) -> list[Tensor]:
        prepared = [prepare_for_inference(model, solver.timesteps) for model in typed]
        return sample_many(prepared, x_T, y, schedules=schedules, max_batch=args.max_batch, **how)

    calls = {"plain fp32": plain} | {f"ours {dtype}": partial(ours, [copy.deepcopy(m).to(DTYPES[dtype]) for m in models]) for dtype in args.dtypes}
    latents: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        latents[name] = torch.stack(calls[name]())

    comparison = record.compare({name: partial(keep, name) for name in calls})
    exact = latents["plain fp32"]
    alone = len(schedules) * solver.num_steps
    record.add(
        f"{' + '.join(args.models)}, {len(schedules)} schedules, {args.num_images} images, {args.num_steps} steps",
        comparison,
        against={name: {"plain fp32": "plain fp32"} for name in calls if name != "plain fp32"},
        settings={key: getattr(args, key) for key in ("models", "parts", "num_images", "num_steps", "cfg_scale", "max_batch")},
        notes={
            name: {
                "evaluations": alone if name == "plain fp32" else sum(count_evaluations(schedules, solver, len(models))),
                "max diff": ((latents[name] - exact).abs().max() / exact.abs().max()).item(),
            }
            for name in calls
        },
    )
    record.show()


if __name__ == "__main__":
    run(main)
