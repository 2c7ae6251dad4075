"""One run of one model: our loop against diffusers' DiTPipeline, with the same random weights, initial latents, labels and DDIM steps.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --models DiT-XL/2 --batch 32 --dtypes bf16 --device cuda

Latents only: nothing is decoded. Ours is timed with plain models and with prepared ones, whose preparation counts. `max diff` is the largest difference
from diffusers' fp32 latents over their largest value; in narrower types diffusers draws other initial latents, so only fp32 is compared.
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

from benchmarks.peers import diffusers_sampler, random_dit
from benchmarks.record import Record, add_bench_args
from dit.checkpoints import DIT_CONFIGS
from dit.inference import prepare_for_inference
from dit.models import DiT
from tstitch.cli import DTYPES, new_parser, positive_int, run
from tstitch.diffusion import create_diffusion
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM

SEED = 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=DIT_CONFIGS, default=["DiT-S/2", "DiT-B/2"], metavar="NAME", help="model sizes")
    parser.add_argument("--input-size", type=positive_int, default=32, help="height and width of the latents")
    parser.add_argument("--batch", type=positive_int, default=4, help="pictures, before guidance doubles them")
    parser.add_argument("--num-steps", type=positive_int, default=20, help="DDIM steps")
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance of all channels, as the pipeline has it; 1 turns it off")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="number types of the weights")
    add_bench_args(parser, rounds=5)
    return parser.parse_args(argv)


def samplers(model: DiT, args: argparse.Namespace) -> dict[str, partial[Tensor]]:
    """The pipeline, our loop on the plain model, and on the prepared one: functions that return latents."""
    device = model.pos_embed.device
    x_T = torch.randn(args.batch, *model.latent_shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    labels = torch.arange(args.batch, device=device)
    solver, guidance = DDIM(create_diffusion(f"ddim{args.num_steps}")), ClassifierFreeGuidance(args.cfg_scale, model.num_classes, channels=None)

    def ours(prepared: bool) -> Tensor:
        denoiser = prepare_for_inference(model, solver.timesteps) if prepared else model
        return sample([denoiser], x_T, labels, schedule=StitchSchedule((1.0,)), solver=solver, guidance=guidance)

    theirs = diffusers_sampler(model, labels.tolist(), args.num_steps, args.cfg_scale, SEED)
    return {"diffusers": partial(theirs), "plain": partial(ours, prepared=False), "ours": partial(ours, prepared=True)}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Time each model, write each as a case, print all."""
    args = parse_args(argv)
    record = Record("sampling", args)
    for name in args.models:
        model = random_dit(name, input_size=args.input_size).to(record.device)
        calls = {
            f"{way} {dtype}": call
            for dtype in args.dtypes
            for way, call in samplers(model if dtype == "fp32" else copy.deepcopy(model).to(DTYPES[dtype]), args).items()
        }
        latents = {way: calls[way]() for way in calls if way.endswith(" fp32")}
        exact = latents.get("diffusers fp32")
        record.measure(
            f"{name}, {args.batch} images, {args.num_steps} steps" + (f", latents {args.input_size}" if args.input_size != 32 else ""),
            calls,
            against={way: {"diffusers": f"diffusers {way.rsplit(' ', 1)[1]}"} for way in calls if not way.startswith("diffusers")},
            settings={"model": name, **{key: getattr(args, key) for key in ("input_size", "batch", "num_steps", "cfg_scale")}},
            notes={way: {"max diff": ((found - exact).abs().max() / exact.abs().max()).item()} for way, found in latents.items()},
        )
    record.show()


if __name__ == "__main__":
    run(main)
