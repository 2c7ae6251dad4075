"""Measure FD-emoji of stitched U-Nets: the 11 ratios of small and large, or some.

    torchrun --nproc-per-node 2 ldm/scripts/sweep_emoji.py --num-images 1000 --dtype bf16 --out pretrained_models/emoji/ldm_results.json
    python ldm/scripts/sweep_emoji.py --solver plms --num-images 1000 --out results/ldm-plms.json --work-dir runs/ldm-plms

Every schedule sees the same noise and the same labels (image i has seed + i and label i modulo 9). All schedules are walked as one tree, a chunk of
images at a time; a killed run goes on to the same numbers. FD-emoji is comparable only with itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.cli import add_ldm_args, hand_over, ldm_plan
from tstitch.cli import add_sampling_args, new_parser, run
from tstitch.emoji_sweep import add_ratios_arg, add_sweep_args, choose_ratios, show, sweep
from tstitch.generate import join_ranks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_ratios_arg(parser)
    add_ldm_args(parser)
    add_sweep_args(parser, "ldm-emoji-sweep")
    add_sampling_args(parser, diffusion=False)
    parser.set_defaults(preset="emoji", num_images=2000, class_labels=list(range(9)))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Walk all schedules over all images, then write the table and draw the front."""
    args = parse_args(argv)
    with join_ranks() as ranks:
        with ranks.agree():
            schedules = choose_ratios(args)
            plan, files, load = ldm_plan(args)
        rows = sweep(args, ranks, plan, files, hand_over(args, plan, schedules), load)
    show(args.out, {"small, large": rows}, plan.walker.describe())


if __name__ == "__main__":
    run(main)
