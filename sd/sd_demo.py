"""Stable Diffusion: a small model takes the first steps, a large one the rest; pictures of every ratio from the same noise.

    python sd/sd_demo.py --prompt "red heart" "dog face, twitter style"                      # the bundled emoji pair, offline
    python sd/sd_demo.py --large Envvi/Inkpunk-Diffusion --small nota-ai/bk-sdm-tiny --prompt "a squirrel in the park, nvinkpunk style"
    python sd/sd_demo.py --prompt "yellow heart" --image heart.png --strength 0.7            # starts from a picture; --mask: changes what is white there

Writes grid.png (rows prompts, columns ratios), every picture and results.json. The emoji pair takes 20 steps with guidance 3, others 50 with guidance 7.5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd.demo import add_picture_arg, demo_parser, demo_plan, load_pipeline, read_picture, run_demo
from sd.tstitch_sd_utils import get_tstitch_pipepline, stitch
from tstitch.cli import SAMPLED, SAMPLING, help_group, run
from tstitch.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUNDLED = {"prompt": ["red heart", "dog face, twitter style"], "steps": 20, "guidance": 3.0, "max_batch": 4}
FETCHED = {"prompt": ["a fox in the snow, detailed drawing"], "steps": 50, "guidance": 7.5, "max_batch": 1}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and fill in what belongs to the large model."""
    parser = demo_parser(__doc__, prompt=None, large="emoji", steps=None, guidance=None, max_batch=None, save_dir="figures/sd")
    add_picture_arg(parser, "start from these pictures, cut to the model's shape, in place of noise alone", required=False)
    help_group(parser, SAMPLING).add_argument(
        "--strength", type=float, help="with --image: how much of the trajectory is walked, 0..1; 1 forgets the picture (default: 0.7)"
    )
    help_group(parser, SAMPLED).add_argument("--mask", type=Path, metavar="FILE", help="with --image: change only what is white in this picture")
    args = parser.parse_args(argv)
    defaults = BUNDLED if args.large == "emoji" else FETCHED
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def start_from_pictures(pipe: DiffusionPipeline, *, masked: bool) -> DiffusionPipeline:
    """The image-to-image or inpainting pipeline of the same stitched models."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    edited = stitch((AutoPipelineForInpainting if masked else AutoPipelineForImage2Image).from_pipe(pipe))
    if getattr(pipe, "_all_hooks", None):
        edited.enable_model_cpu_offload(device=pipe._offload_device)
    return edited


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    if args.mask and not args.image:
        raise InputError("--mask says what to change in a picture; pass it with --image")
    if args.strength is not None and not args.image:
        raise InputError("--strength says how much of a picture is kept; pass it with --image")
    if args.strength is None and args.image:
        args.strength = 0.7
    plan = demo_plan(args)
    if args.image and not (0 < args.strength <= 1 and int(plan.steps * args.strength) >= 1):
        raise InputError(f"--strength {args.strength:g} of {plan.steps} steps is no step; choose more, up to 1")
    masks = [read_picture(args.mask)] * len(plan.pictures) if args.mask else []
    pipe = load_pipeline(get_tstitch_pipepline, plan)
    if not plan.pictures:
        run_demo(pipe, plan)
        return
    inputs = {"image": plan.fitted(pipe)} | ({"mask_image": plan.fitted(pipe, masks)} if masks else {})
    shown = dict(zip(("picture", "mask"), inputs.values(), strict=False))
    # An inpainting pipeline asks the U-Net for its size, not the picture.
    size = dict(zip(("width", "height"), inputs["image"][0].size, strict=True)) if masks else {}
    run_demo(start_from_pictures(pipe, masked=bool(masks)), plan, shown, inputs, strength=args.strength, **size)


if __name__ == "__main__":
    run(main)
