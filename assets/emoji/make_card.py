"""Draw the pictures of the model card: loss curves, and samples beside their nearest training drawings.

    python assets/emoji/make_card.py     # reads pretrained_models/emoji, writes its loss.png and samples.png

The nearest drawing (mean squared pixel difference) shows how far a model copies what it was trained on. The same distance from held-out drawings to the
training drawings says how near two different drawings are anyway.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.emoji.emoji_data import DATASET, load_drawings
from dit.checkpoints import load_denoisers
from ldm.cli import ldm_plan
from ldm.scripts.sample_imagenet_32_t_stitch import parse_args as parse_ldm_args
from sit.checkpoints import load_flows
from sit.flows import flow_walker
from sit.transport import ODE, create_transport
from tstitch.autoencoder import Autoencoder
from tstitch.cli import SamplingPlan, add_sampling_args, new_parser, run, sampling_plan
from tstitch.guidance import Denoiser
from tstitch.plots import image_grid, plot_curves, save_image
from tstitch.presets import ROOT, SIT_PRESETS, DenoiserFile
from tstitch.schedule import StitchSchedule


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATASET, help="drawings, from build_dataset.py")
    parser.add_argument("--models", type=Path, default=ROOT / "pretrained_models" / "emoji", help="folder of the card")
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji", class_labels=list(range(9)), num_images=18)
    return parser.parse_args(argv)


def nearest(pictures: Tensor, drawings: Tensor) -> tuple[Tensor, Tensor]:
    """For uint8 pictures (N, 3, H, W): index of the nearest drawing, and root mean squared difference in grey levels; each (N,)."""
    small = [torch.nn.functional.avg_pool2d(x.float(), 2).flatten(1) for x in (pictures, drawings)]  # 32x32: shifts of one pixel count less
    distances = torch.cdist(*small) / small[0].shape[1] ** 0.5
    best = distances.min(dim=1)
    return best.indices, best.values


def plot_losses(folder: Path) -> None:
    """Loss by training step from logs/{backbone}-{model}*.jsonl, a model's second round behind its first."""
    panels = {}
    for name, backbone, models in (
        ("DiT: noise, min-SNR weighted", "dit", ("small", "base", "large")),
        ("SiT: velocity", "sit", ("small", "large")),
        ("U-Net: noise, min-SNR weighted", "ldm", ("small", "large")),
        ("U-Net with text: the same", "sd", ("small", "large")),
    ):
        panels[name] = {}
        for model in models:
            curve, before = [], 0
            for log in sorted((folder / "logs").glob(f"{backbone}-{model}*.jsonl")):
                curve += [(before + row["step"], row["loss"]) for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
                before = curve[-1][0]
            panels[name][model] = curve
    plot_curves(folder / "loss.png", panels, xlabel="training step")


def plans(args: argparse.Namespace) -> Iterator[tuple[str, SamplingPlan, Sequence[DenoiserFile], Sequence[Denoiser]]]:
    """Backbone, plan, files and models: DiTs and U-Nets along DDIM, the SiTs along an ODE with as many evaluations."""
    plan = sampling_plan(args)
    yield "DiT", plan, plan.preset.denoisers, load_denoisers(plan, plan.preset.denoisers)
    plan = replace(sampling_plan(args, presets=SIT_PRESETS, diffusion=False), walker=flow_walker(ODE(create_transport(), "heun2", 11)))
    yield "SiT", plan, plan.preset.denoisers, load_flows(plan, plan.preset.denoisers)
    labels = ["--class-labels", *map(str, args.class_labels), "--num-images", str(args.num_images), "--seed", str(args.seed), "--dtype", args.dtype]
    plan, files, load = ldm_plan(parse_ldm_args(["--preset", "emoji", *labels]))
    yield "LDM", plan, files, load(plan, files)


def main(argv: list[str] | None = None) -> None:
    """Draw both pictures, print the distances."""
    args = parse_args(argv)
    plot_losses(args.models)
    train, held_out = load_drawings(args.data, held_out=False), load_drawings(args.data, held_out=True)
    columns, headers = [], []
    for backbone, plan, files, denoisers in plans(args):
        autoencoder = Autoencoder(plan.vae, plan.device)
        for file, denoiser in zip(files, denoisers, strict=True):
            walked = plan.walker.walk(
                [denoiser], plan.noise.latents(denoiser.latent_shape, plan.device), plan.labels.to(plan.device), schedules=[StitchSchedule((1.0,))],
                guidance=plan.guidance, noise=plan.noise, max_batch=plan.max_batch,
            )  # fmt: skip
            pictures = autoencoder.decode(walked.latents[0])
            index, distance = nearest(pictures, train.images)
            name = f"{backbone} {file.model.removeprefix('emoji-')}"
            print(f"{name}: nearest training drawing at {distance.median():.1f} grey levels (median of {len(distance)} samples)")
            columns += [pictures, train.images[index]]
            headers += [name, "nearest"]
    print(f"held-out drawings: nearest training drawing at {nearest(held_out.images, train.images)[1].median():.1f} grey levels (median)")
    names = [plan.preset.class_name(label) for label in plan.labels.tolist()]
    save_image(args.models / "samples.png", image_grid(torch.stack(columns, dim=1), headers, names, cell=64))


if __name__ == "__main__":
    run(main)
