"""Measure FD-emoji of stitched flows: the 11 ratios of small and large, along an ODE or an SDE.

    torchrun --nproc-per-node 2 sit/sweep_emoji.py ODE --sampling-method heun2 --num-sampling-steps 11 --dtype bf16 --out results/ode_heun2_20.json
    python sit/sweep_emoji.py SDE --num-sampling-steps 21 --num-images 1000

Every schedule sees the same noise and the same labels (image i has seed + i and label i modulo 9); a killed run goes on to the same numbers. With an
adaptive method a chunk of images shares its steps. FD-emoji is comparable only with itself.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sit.checkpoints import flow_plan, load_flows, mark_dits
from sit.cli import add_dit_arg, add_equation_args, given_words
from tstitch.cli import add_sampling_args, add_weights_args, new_parser, run, sampling_plan, stitched_files
from tstitch.emoji_sweep import add_ratios_arg, add_sweep_args, choose_ratios, show, sweep
from tstitch.generate import join_ranks
from tstitch.presets import SIT_PRESETS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_equation_args(parser)
    add_ratios_arg(parser)
    add_sweep_args(parser, "sit-emoji-sweep")
    add_weights_args(parser)
    add_dit_arg(parser)
    add_sampling_args(parser, diffusion=False)
    parser.set_defaults(preset="emoji", num_images=1000, class_labels=list(range(9)))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Walk all schedules over all images, then write the table and draw the front."""
    args = parse_args(argv)
    with join_ranks() as ranks:
        with ranks.agree():
            plan = sampling_plan(args, presets=SIT_PRESETS, diffusion=False)
            files = mark_dits(args, stitched_files(args, plan, three=False))
            plan = flow_plan(args, plan, files, alone=False)
            schedules = choose_ratios(args)
        rows = sweep(args, ranks, plan, files, schedules, partial(load_flows, given=given_words(args)))
    show(args.out, {"small, large": rows}, plan.walker.describe())


if __name__ == "__main__":
    run(main)
