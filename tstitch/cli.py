"""What every command line shares: a parser that explains itself, one-sentence errors, and the words for seeds, devices and number types."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.presets import PRESETS, Preset, get_preset
from tstitch.solvers import SOLVERS, Solver, create_solver

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the docstring's line breaks and show defaults."""


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser whose description is the script's docstring; abbreviated flags are errors, not guesses."""
    return argparse.ArgumentParser(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def run(main: Callable[[], None]) -> None:
    """Run a script: input that cannot be used becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse_device(name: str) -> torch.device:
    """Read --device: auto (cuda, then mps, then cpu) or a torch device name.

    Raises:
        InputError: if torch knows no such device or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise InputError(f"device '{name}' is not available here; use --device auto, cpu, cuda or mps") from None
    return device


def add_sampling_args(parser: argparse.ArgumentParser) -> None:
    """Add the words that every sampling script shares; `sampling_plan` reads them."""
    group = parser.add_argument_group("sampling (defaults come from the preset)")
    group.add_argument("--preset", metavar="NAME", help=f"model set: {', '.join(PRESETS)} (default: imagenet of --image-size)")
    group.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width of the pictures, a multiple of the latents' and patches' size")
    group.add_argument("--num-classes", type=int, help="number of classes; the null label is this number")
    group.add_argument("--class-labels", type=int, nargs="+", metavar="LABEL", help="one class for each picture, 0..num_classes-1")
    group.add_argument("--num-images", type=int, help="how many pictures; the labels repeat (default: one for each label)")
    group.add_argument("--num-sampling-steps", type=int, metavar="N", help="solver steps, 1..1000 (a single one is taken at t = 0, as published)")
    group.add_argument("--solver", default="ddim", metavar="NAME", help=f"one of {', '.join(SOLVERS)}")
    group.add_argument("--cfg-scale", type=float, help="uncond + scale * (cond - uncond); 1 turns guidance off")
    group.add_argument("--cfg-channels", metavar="N|all", help="how many latent channels are guided; published DiT samples guide 3 of 4")
    group.add_argument("--seed", type=int, default=0, help="picture i is made from seed + i alone")
    group.add_argument("--max-batch", type=positive_int, default=64, metavar="N", help="most pictures in one denoiser call, before guidance doubles them")
    group.add_argument("--vae", help="mse or ema (the Stable Diffusion autoencoders), a folder in diffusers format, or a hub name")
    group.add_argument("--dtype", choices=DTYPES, default="fp32", help="number type of the denoisers' weights")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


@dataclass(frozen=True)
class SamplingPlan:
    """Checked and complete sampling arguments: what `add_sampling_args` asks for, with the preset's values filled in."""

    preset: Preset
    image_size: int
    num_classes: int
    labels: Tensor
    noise: SampleNoise
    solver: Solver
    guidance: ClassifierFreeGuidance
    vae: str
    device: torch.device
    dtype: torch.dtype
    max_batch: int

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // self.preset.downsampling

    @property
    def settings(self) -> dict[str, object]:
        """What two results must have in common to be compared."""
        return {
            "preset": self.preset.name, "image_size": self.image_size, "solver": type(self.solver).__name__,
            "num_steps": self.solver.num_steps, "spacing": "even", "cfg_scale": self.guidance.scale, "cfg_channels": self.guidance.channels or "all",
        }  # fmt: skip


def _given(value: object, default: object) -> object:
    return default if value is None else value


def sampling_plan(args: argparse.Namespace) -> SamplingPlan:
    """Check the sampling arguments before anything is loaded, and fill in the preset's values.

    Raises:
        InputError: for the first argument that cannot be used.
    """
    image_size = _given(args.image_size, 256)
    preset = get_preset(args.preset) if args.preset else get_preset("imagenet512" if image_size == 512 else "imagenet256")
    image_size = _given(args.image_size, preset.image_size)
    if image_size < 1 or image_size % preset.downsampling:
        raise InputError(f"--image-size {image_size} is not divisible by {preset.downsampling}, the pixels per latent; choose a multiple")
    num_classes = _given(args.num_classes, preset.num_classes)
    if num_classes < 1:
        raise InputError(f"--num-classes must be at least 1, got {num_classes}")
    labels = list(_given(args.class_labels, preset.labels))
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise InputError(f"class labels {wrong} are out of range; choose from 0..{num_classes - 1}")
    count = _given(args.num_images, len(labels))
    if count < 1:
        raise InputError(f"--num-images must be at least 1, got {count}")
    num_steps = _given(args.num_sampling_steps, preset.num_sampling_steps)
    if not 1 <= num_steps <= 1000:
        raise InputError(f"--num-sampling-steps must lie in 1..1000, got {num_steps}")
    if args.seed < 0:
        raise InputError(f"--seed must not be negative, got {args.seed}")
    cfg_scale = _given(args.cfg_scale, preset.cfg_scale)
    if not math.isfinite(cfg_scale):
        raise InputError(f"--cfg-scale must be a finite number, got {cfg_scale}")
    return SamplingPlan(
        preset=preset,
        image_size=image_size,
        num_classes=num_classes,
        labels=torch.tensor([labels[i % len(labels)] for i in range(count)]),
        noise=SampleNoise(range(args.seed, args.seed + count)),
        solver=create_solver(args.solver, create_diffusion(str(num_steps))),
        guidance=ClassifierFreeGuidance(cfg_scale, num_classes, _parse_channels(args.cfg_channels, preset)),
        vae={"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}.get(args.vae, args.vae or preset.vae),
        device=parse_device(args.device),
        dtype=DTYPES[args.dtype],
        max_batch=args.max_batch,
    )


def _parse_channels(text: str | None, preset: Preset) -> int | None:
    if text is None:
        return preset.cfg_channels
    if text != "all" and not text.isdigit():
        raise InputError(f"--cfg-channels is a number or 'all', got '{text}'")
    return None if text == "all" else int(text)
