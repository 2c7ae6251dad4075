"""SDXL that follows poses: a ControlNet sees how people in a picture stand; a small model takes the first steps, a large one the rest.

    pip install controlnet-aux==0.0.10
    python sd/sdxl_pose.py --image dancer.jpg --prompt "a robot dancing in a futuristic city"

Writes grid.png (rows prompts and pictures, columns ratios), every picture and results.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from sd.demo import controlnet_parser, demo_plan, run_controlnet_demo
from sd.tstitch_sd_utils import load_part
from tstitch.cli import MODELS, help_group, run
from tstitch.errors import InputError

PROMPT = "a robot dancing in a futuristic city, high quality"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = controlnet_parser(__doc__, prompt=PROMPT, controlnet="thibaud/controlnet-openpose-sdxl-1.0", save_dir="figures/sdxl_pose")
    help_group(parser, MODELS).add_argument(
        "--detector", default="lllyasviel/Annotators", metavar="NAME", help="OpenPose weights: a hub name, or a folder of their .pth files"
    )
    return parser.parse_args(argv)


def pose_detector(source: str, device: torch.device) -> Callable[[Image.Image], Image.Image]:
    """A function that draws the bodies in a picture as coloured bones.

    Raises:
        InputError: if controlnet-aux is not installed, or the weights cannot be loaded.
    """
    if importlib.util.find_spec("controlnet_aux") is None:
        raise InputError("poses are found by controlnet-aux, which is not installed; pip install controlnet-aux==0.0.10")
    from controlnet_aux import OpenposeDetector

    detector = load_part("pose detector", source, OpenposeDetector.from_pretrained, source).to(device)
    return lambda picture: detector(picture, detect_resolution=min(512, *picture.size), image_resolution=min(picture.size))


def main(argv: list[str] | None = None) -> None:
    """Check, load, draw the poses, sample, save."""
    args = parse_args(argv)
    plan = demo_plan(args)
    run_controlnet_demo(args, plan, "pose", pose_detector(args.detector, plan.loading["device"]))


if __name__ == "__main__":
    run(main)
