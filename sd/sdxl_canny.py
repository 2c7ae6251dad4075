"""SDXL that follows edges: a ControlNet sees what Canny finds in a picture; a small model takes the first steps, a large one the rest.

    python sd/sdxl_canny.py --image house.jpg --prompt "a gingerbread house, studio photograph" --thresholds 100 200

Writes grid.png (rows prompts and pictures, columns ratios), every picture and results.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from PIL import Image

from sd.demo import controlnet_parser, demo_plan, run_controlnet_demo
from tstitch.cli import SAMPLED, help_group, run

PROMPT = "aerial view of a research station in the ice, cinematic, highly detailed"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = controlnet_parser(__doc__, prompt=PROMPT, controlnet="diffusers/controlnet-canny-sdxl-1.0", save_dir="figures/sdxl_canny")
    help_group(parser, SAMPLED).add_argument(
        "--thresholds", type=float, nargs=2, default=[100, 200], metavar=("LOW", "HIGH"), help="of the gradient, in grey levels; higher ones find fewer edges"
    )
    return parser.parse_args(argv)


def edges(picture: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Edges of a picture, white on black (Canny 1986, as OpenCV does it)."""
    return Image.fromarray(cv2.Canny(np.asarray(picture), low, high))


def main(argv: list[str] | None = None) -> None:
    """Check, load, draw the edges, sample, save."""
    args = parse_args(argv)
    run_controlnet_demo(args, demo_plan(args), "edges", lambda picture: edges(picture, *args.thresholds))


if __name__ == "__main__":
    run(main)
