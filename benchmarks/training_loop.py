"""What a training step costs: the plain loop of the published trainers, and ours.

    python benchmarks/training_loop.py
    python benchmarks/training_loop.py --model DiT-XL/2 --batch-size 32 --device cuda --compile

The plain loop keeps float32, or has autocast around the loss, steps torch's AdamW as it comes and averages the weights parameter by parameter in Python.
Ours is the step of `tstitch.training.fit` in that number type: one fused kernel for the optimizer, one call for the average. Both draw the same batches
from the same store of random features and clip the gradient, as the recipe of the bundled models does. Steps, not losses, are compared.

With --compile, ours is timed compiled too; `pays after` is the number of steps at which the time that compiling took has come back.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.feature_loading import write_random_store
from benchmarks.harness import compare
from benchmarks.record import Record, add_bench_args
from dit.checkpoints import DIT_CONFIGS, build_dit
from tstitch.cli import new_parser, positive_int, run
from tstitch.data import FeatureStore
from tstitch.diffusion import create_diffusion
from tstitch.training import EMA, draw_batch, take_step
from tstitch.tune import wait_for


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", choices=DIT_CONFIGS, default="emoji-small", help="model that is trained")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="items a step; 128 as the bundled small model was trained")
    parser.add_argument("--count", type=positive_int, default=5000, help="features in the store, 4 KB each")
    parser.add_argument("--compile", action="store_true", help="time ours compiled, too")
    add_bench_args(parser, rounds=7)
    return parser.parse_args(argv)


def batch_losses(data: FeatureStore, size: int, device: torch.device) -> Callable[[nn.Module, int, int], dict[str, Tensor]]:
    """Losses of a step as dit/train.py has them."""
    diffusion = create_diffusion("")

    def losses(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        index = draw_batch(None, len(data), step=step, part=part, num_parts=1, size=size, seed=0)
        x_0, y = data.latents(index).to(device), data.labels[index].to(device)
        t, noise = torch.randint(diffusion.num_timesteps, (size,)).to(device), torch.randn(x_0.shape).to(device)
        return {"loss": diffusion.training_losses(model, x_0, t, {"y": y}, noise=noise)["loss"].mean()}

    return losses


def plain_step(model: nn.Module, losses: Callable, device: torch.device, bf16: bool) -> Callable[[], None]:
    """A step of the published loops."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0), itertools.count()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = losses(model, next(steps), 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            ours = dict(model.named_parameters())
            for name, parameter in average.named_parameters():
                parameter.mul_(0.9999).add_(ours[name].data, alpha=1 - 0.9999)

    return step


def our_step(model: nn.Module, losses: Callable, accelerator: Accelerator, bf16: bool) -> Callable[[], None]:
    """A step of `fit`."""
    fused = accelerator.device.type in ("cpu", "cuda")
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=fused))
    ema, steps = EMA(prepared, 0.9999), itertools.count()

    def in_type(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        # One process has one Accelerator; this is what its mixed precision does to the forward.
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            return losses(model, step, part)

    def step() -> None:
        k = next(steps)
        take_step(prepared, in_type, k, accelerator=accelerator, optimizer=optimizer)
        ema.update(prepared, k)

    return step


def main(argv: list[str] | None = None) -> None:
    """Time steps in turn, write the case, print it."""
    args = parse_args(argv)
    record = Record("training_loop", args)
    accelerator = Accelerator(cpu=record.device.type == "cpu")
    with tempfile.TemporaryDirectory() as folder:
        data = write_random_store(Path(folder), args.count)
        losses = batch_losses(data, args.batch_size, record.device)
        channels, size, _ = data.latent_shape

        def model() -> nn.Module:
            torch.manual_seed(0)
            return build_dit(args.model, input_size=size, in_channels=channels, num_classes=data.num_classes).to(record.device).train()

        calls, notes = {}, {}
        for name, bf16 in (("fp32", False), ("bf16", True)):
            calls[f"plain {name}"] = plain_step(model(), losses, record.device, bf16)
            calls[f"ours {name}"] = our_step(model(), losses, accelerator, bf16)
            if args.compile:
                compiled = model()
                compiled.compile()
                calls[f"ours {name}, compiled"] = our_step(compiled, losses, accelerator, bf16)
        seconds_to_start = {name: seconds_of(call, record.device) for name, call in calls.items() if "compiled" in name}
        comparison = compare(calls, record.device, args.rounds, gate=not args.no_gate)
    for name, began in seconds_to_start.items():
        saved = comparison.median(name.removesuffix(", compiled")) - comparison.median(name)
        notes[name] = {"start s": round(began, 1), "pays after": f"{began / saved:.0f} steps" if saved > 0 else "never"}
    against = {name: {"plain": "plain " + name.split()[1].strip(","), "plain fp32": "plain fp32"} for name in calls}
    settings = {"model": args.model, "batch_size": args.batch_size, "input_size": size}
    record.add(f"{args.model}, batch {args.batch_size}", comparison, against=against, settings=settings, notes=notes)
    record.show()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a first call, compiling included."""
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
