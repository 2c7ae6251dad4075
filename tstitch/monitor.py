"""Watching a training run: previews and Frechet distance of the moving average, while it trains.

All processes take part: each samples its chunks of the same pictures, and their feature sums are added. Picture i depends on its seed alone, so the curve
shows the model and not the luck of the draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tstitch.autoencoder import Autoencoder
from tstitch.cli import positive_int
from tstitch.data import check_vae
from tstitch.diffusion import create_diffusion
from tstitch.dry_run import MEASURED_ON_CPU, REPEATS, Work, count_flops
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.metrics import FeatureStatistics, frechet_distance
from tstitch.metrics.extractors import EXTRACTORS, Extractor, create_extractor, load_reference_statistics
from tstitch.metrics.npz import Statistics
from tstitch.noise import SampleNoise
from tstitch.plots import contact_sheet, save_image
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM
from tstitch.training_cli import TrainingPlan
from tstitch.tune import measure_seconds

PREVIEWS = 16
Walk = Callable[[nn.Module, Tensor, Tensor, ClassifierFreeGuidance], Tensor]  # (model, initial noise, labels, guidance) -> latents


class ClassModel(Protocol):
    """What is asked of a model of classes before it trains."""

    config: dict[str, Any]
    num_classes: int


def add_monitor_args(parser: argparse.ArgumentParser) -> None:
    """Add the --eval words; `create_monitor` reads them."""
    group = parser.add_argument_group("evaluation during training (pictures are decoded with --vae)")
    group.add_argument("--eval-every", "--sample-every", type=int, default=0, metavar="STEPS", help="steps between evaluations of the moving average; 0: none")
    group.add_argument("--eval-images", type=positive_int, default=1000, help="pictures sampled for the Frechet distance")
    group.add_argument("--eval-extractor", choices=["none", *EXTRACTORS], default="none", help="features of the Frechet distance; none draws previews only")
    group.add_argument("--eval-reference", type=Path, metavar="FILE", help="reference pictures or statistics (.npz); not needed for emoji")
    group.add_argument("--eval-num-sampling-steps", type=positive_int, default=20, help="solver steps, of one evaluation each")
    group.add_argument("--eval-cfg-scale", "--cfg-scale", type=float, default=1.5, help="guidance on all channels; 1 turns it off")
    group.add_argument("--eval-batch-size", type=positive_int, default=32, help="pictures sampled together in each process")


def walk_ddim(num_steps: int) -> Walk:
    """How a diffusion model is sampled for a monitor."""
    solver = DDIM(create_diffusion(str(num_steps)))

    def walk(model: nn.Module, x_T: Tensor, y: Tensor, guidance: ClassifierFreeGuidance) -> Tensor:
        return sample([model], x_T, y, schedule=StitchSchedule((1.0,)), solver=solver, guidance=guidance)

    return walk


def create_monitor(args: argparse.Namespace, plan: TrainingPlan, model: ClassModel, walk_of: Callable[[int], Walk] = walk_ddim) -> Monitor | None:
    """What --eval-every asks for; None where it is 0.

    Args:
        walk_of: number of steps -> how the trainer's models are sampled.

    Raises:
        InputError: if the autoencoder, the extractor or the reference is missing or does not fit, or words of an evaluation are given without
            --eval-every, before any step is taken.
    """
    if args.eval_every < 0:
        raise InputError(f"--eval-every must not be negative, got {args.eval_every}")
    if not args.eval_every:
        add_monitor_args(parser := argparse.ArgumentParser())
        idle = [f"--{name.replace('_', '-')}" for name, default in vars(parser.parse_args([])).items() if getattr(args, name) != default]
        if idle:
            raise InputError(f"{', '.join(idle)} without --eval-every evaluates nothing; pass --eval-every STEPS")
        return None
    if args.eval_cfg_scale != 1 and model.config["class_dropout_prob"] == 0:
        raise InputError("without label dropout there is no null label to guide from; pass --eval-cfg-scale 1")
    accelerator = plan.accelerator
    autoencoder = Autoencoder(args.vae, accelerator.device)
    size = plan.data.latent_shape[-1] * autoencoder.downsampling
    autoencoder.check_fit(plan.data.latent_shape, plan.data.index.get("image_size", size))
    check_vae(plan.data, autoencoder.source)
    extractor = reference = None
    if args.eval_extractor != "none":
        if args.eval_images < 2:
            raise InputError("a Frechet distance needs at least 2 pictures; pass a larger --eval-images")
        extractor = create_extractor(args.eval_extractor, accelerator.device)
        if extractor.image_size not in (None, size):
            raise InputError(f"the extractor {extractor.name} knows {extractor.image_size}x{extractor.image_size} pictures, not {size}x{size}; choose another")
        reference = load_reference_statistics(extractor, args.eval_reference)
    guidance = ClassifierFreeGuidance(args.eval_cfg_scale, model.num_classes, None)
    return Monitor(
        args.results_dir / "previews",
        accelerator,
        autoencoder,
        walk_of,
        guidance,
        num_steps=args.eval_num_sampling_steps,
        latent_shape=plan.data.latent_shape,
        num_classes=plan.data.num_classes,
        num_images=args.eval_images,
        batch=args.eval_batch_size,
        extractor=extractor,
        reference=reference,
    )


class Monitor:
    """Called as monitor(model, step): writes folder/{step:07d}.png and returns {"fid" or "fd_emoji": distance}, or {} without an extractor.

    Args:
        walk_of: number of steps -> how a model is sampled, without drawing any noise.
        num_images: pictures for the distance; picture i has seed i and label i modulo num_classes.
        batch: pictures sampled together by a process.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, autoencoder: Autoencoder, walk_of: Callable[[int], Walk], guidance: ClassifierFreeGuidance, *,
        num_steps: int, latent_shape: tuple[int, ...], num_classes: int, num_images: int, batch: int, extractor: Extractor | None = None,
        reference: Statistics | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.accelerator, self.autoencoder, self.guidance = folder, accelerator, autoencoder, guidance
        self.num_steps, self.walk, self.one_step = num_steps, walk_of(num_steps), walk_of(1)
        self.latent_shape, self.num_classes, self.num_images, self.batch = latent_shape, num_classes, num_images, batch
        self.extractor, self.reference = extractor, reference

    def pictures(self, model: nn.Module, index: Tensor) -> Tensor:
        """Sample pictures (n, 3, H, W), uint8, of the numbers in `index`."""
        noise, device = SampleNoise(index.tolist()), self.accelerator.device
        latents = self.walk(model, noise.latents(self.latent_shape, device), (index % self.num_classes).to(device), self.guidance)
        return self.autoencoder.decode(latents)

    @torch.no_grad()
    def work(self, model: nn.Module, times: int) -> list[Work]:
        """What `times` evaluations cost, for --dry-run: a step of the solver is measured, and what is done with its pictures; every process calls it."""
        device, world = self.accelerator.device, self.accelerator.num_processes
        n = min(self.batch, MEASURED_ON_CPU) if device.type == "cpu" else self.batch
        y, x = torch.arange(n, device=device) % self.num_classes, SampleNoise(range(n)).latents(self.latent_shape, device)

        pictures = self.autoencoder.decode(x)
        calls = {
            "evaluation": lambda: self.one_step(model, x, y, self.guidance),
            "its decoding": lambda: self.autoencoder.decode(x),
            "its features": lambda: None if self.extractor is None else self.extractor(pictures),
        }
        # Of all processes and of one; each draws the previews, and is called as often as the others.
        measured = (0, 0) if self.extractor is None else (self.num_images, -(-self.num_images // (self.batch * world)) * self.batch)
        sampled = measured[0] + PREVIEWS * world, measured[1] + PREVIEWS
        counts = [(sampled[0] * self.num_steps, sampled[1] * self.num_steps), sampled, measured]
        seconds = measure_seconds(list(calls.values()), device, REPEATS)
        return [
            Work(name, times * everyone, count_flops(call) / n, spent / n, busiest=times * min(everyone, busiest))
            for (name, call), (everyone, busiest), spent in zip(calls.items(), counts, seconds, strict=True)
        ]

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Draw the previews, measure the distance."""
        previews = self.pictures(model, torch.arange(PREVIEWS))  # by every process: a sharded model needs them all
        if self.accelerator.is_main_process:
            save_image(self.folder / f"{step:07d}.png", contact_sheet(previews, f"step {step}", columns=8))
        if self.extractor is None:
            return {}
        assert self.reference is not None  # the two come together
        statistics = FeatureStatistics(self.extractor.dim)
        chunks = torch.arange(self.num_images).split(self.batch)
        world = self.accelerator.num_processes
        for k in range(0, len(chunks), world):
            # Every process calls the model equally often; what is past the end is not counted.
            mine = k + self.accelerator.process_index
            pictures = self.pictures(model, chunks[min(mine, len(chunks) - 1)])
            if mine < len(chunks):
                statistics.update(self.extractor(pictures))
        if world > 1:
            for name, value in statistics.totals.items():
                statistics.totals[name] = self.accelerator.reduce(torch.as_tensor(value, device=self.accelerator.device), "sum").cpu().numpy()
        return {self.extractor.distance: frechet_distance(statistics.mean, statistics.covariance, *self.reference)}
