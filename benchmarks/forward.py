"""One call of a denoiser: ours, ours prepared for inference, as published, and diffusers', with the same random weights.

    python benchmarks/forward.py
    python benchmarks/forward.py --models DiT-XL/2 --batches 32 64 --dtypes bf16 --device cuda --compile

Every batch has its own labels and one timestep. Prepared models have met both before, as in all steps of a run but its first: what they compute once for a
whole run is not timed here; it is in sweep.py and sampling.py. `of peak` is the fraction of a square matrix product's FLOP/s, timed in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import Call, dit_flops, matrix_product
from benchmarks.peers import as_denoiser, as_published, diffusers_dit, random_dit
from benchmarks.record import Record, add_bench_args
from dit.checkpoints import DIT_CONFIGS
from dit.inference import prepare_for_inference
from dit.models import DiT
from tstitch.cli import DTYPES, new_parser, positive_int, run
from tstitch.guidance import Denoiser

TIMESTEPS = range(950, -1, -50)  # those of 20 DDIM steps


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=DIT_CONFIGS, default=["DiT-S/2", "DiT-B/2", "DiT-XL/2"], metavar="NAME", help="model sizes")
    parser.add_argument("--input-size", type=positive_int, default=32, help="height and width of the latents; 32 for pictures of 256x256")
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[2, 8], metavar="N", help="latents a call, guidance's second half included")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="number types of the weights")
    parser.add_argument("--compile", action="store_true", help="time ours compiled, too")
    add_bench_args(parser, rounds=7)
    return parser.parse_args(argv)


def variants(model: DiT, compiled: bool) -> dict[str, Denoiser]:
    """Ways to call one model."""
    found = {
        "plain": model,
        "published": as_published(model),
        "diffusers": as_denoiser(diffusers_dit(model)),
        "ours": prepare_for_inference(model, TIMESTEPS),
    }
    return found | ({"compiled": prepare_for_inference(model, TIMESTEPS, compile=True)} if compiled else {})


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Time each model and batch, write each as a case, print all."""
    args = parse_args(argv)
    record = Record("forward", args)
    for name in args.models:
        model = random_dit(name, input_size=args.input_size).to(record.device)
        ways: dict[str, Denoiser] = {}
        for dtype in args.dtypes:
            typed = model if dtype == "fp32" else copy.deepcopy(model).to(DTYPES[dtype])
            ways |= {f"{way} {dtype}": call for way, call in variants(typed, args.compile).items()}
        for batch in args.batches:
            measure(record, args, name, model, ways, batch)
        del model, typed, ways
    record.show()


def measure(record: Record, args: argparse.Namespace, name: str, model: DiT, ways: dict[str, Denoiser], batch: int) -> None:
    """Time all ways to call one model with one batch."""
    x = torch.randn(batch, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(record.device)
    t, y = torch.full((batch,), TIMESTEPS[len(TIMESTEPS) // 2], device=record.device), torch.arange(batch, device=record.device)
    exact = model(x, t, y)
    calls: dict[str, Call] = {way: partial(denoiser, x, t, y) for way, denoiser in ways.items()}
    products: dict[str, str] = {}
    for dtype in args.dtypes:
        product = matrix_product(dtype, DTYPES[dtype], record.device)
        products[dtype] = next(iter(product))
        calls |= product
    record.measure(
        f"{name}, batch {batch}" + (f", latents {args.input_size}" if args.input_size != 32 else ""),
        calls,
        against={way: references(way, args.dtypes) for way in ways},
        settings={"model": name, "batch": batch, "input_size": args.input_size, "output_max": exact.abs().max().item()},
        flops={way: (dit_flops(model.config, batch), products[way.rsplit(" ", 1)[1]]) for way in ways},
        notes={way: {"max diff": (denoiser(x, t, y) - exact).abs().max().item()} for way, denoiser in ways.items()},
    )


def references(way: str, dtypes: list[str]) -> dict[str, str]:
    """What one way is compared with: plain and published of its number type, and plain fp32."""
    kind, dtype = way.rsplit(" ", 1)
    found = {label: f"{label} {dtype}" for label in ("plain", "published") if label != kind}
    return found | ({"plain fp32": "plain fp32"} if dtype != "fp32" and "fp32" in dtypes else {})


if __name__ == "__main__":
    run(main)
