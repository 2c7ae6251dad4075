"""SDXL that follows depth: a ControlNet sees how far things are in a picture; a small model takes the first steps, a large one the rest.

    python sd/sdxl_depth.py --image tree.jpg --prompt "a bonsai tree, masterpiece"

Writes grid.png (rows prompts and pictures, columns ratios), every picture and results.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from sd.demo import controlnet_parser, demo_plan, run_controlnet_demo
from sd.tstitch_sd_utils import load_part
from tstitch.cli import MODELS, help_group, run

PROMPT = "a bonsai tree, masterpiece, highly detailed"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = controlnet_parser(__doc__, prompt=PROMPT, controlnet="diffusers/controlnet-depth-sdxl-1.0", save_dir="figures/sdxl_depth")
    help_group(parser, MODELS).add_argument(
        "--estimator", default="Intel/dpt-hybrid-midas", metavar="NAME", help="depth model: a hub name, or a folder in transformers' format"
    )
    return parser.parse_args(argv)


def depth_estimator(source: str, device: torch.device) -> Callable[[Image.Image], Image.Image]:
    """A function that draws the depth of a picture, near things bright.

    Raises:
        InputError: if the model cannot be loaded.
    """
    from transformers import pipeline

    estimate = load_part("depth estimator", source, pipeline, "depth-estimation", model=source, device=device)
    return lambda picture: estimate(picture)["depth"]


def main(argv: list[str] | None = None) -> None:
    """Check, load, draw the depths, sample, save."""
    args = parse_args(argv)
    plan = demo_plan(args)
    run_controlnet_demo(args, plan, "depth", depth_estimator(args.estimator, plan.loading["device"]))


if __name__ == "__main__":
    run(main)
