"""Find the schedule of a small and a large SiT for a budget: the best within a latency, or the fastest within a loss of quality.

    python sit/tune.py ODE --preset emoji --sampling-method heun2 --num-sampling-steps 11 --speed-up 1.5
    python sit/tune.py SDE --preset emoji --num-sampling-steps 21 --max-loss 5

An evaluation of each model is measured here; the cost of each of the 11 ratios is then a sum. Methods that choose their own steps are refused.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sit.checkpoints import flow_plan, load_flows, mark_dits
from sit.cli import add_dit_arg, add_equation_args, given_words
from tstitch.budget import add_budget_args, check_budget, tune
from tstitch.cli import add_sampling_args, add_weights_args, new_parser, run, sampling_plan, stitched_files
from tstitch.presets import SIT_PRESETS
from tstitch.schedule import two_way_ratios


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_equation_args(parser)
    add_budget_args(parser, "sit")
    add_weights_args(parser)
    add_dit_arg(parser)
    add_sampling_args(parser, diffusion=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, measure, choose."""
    args = parse_args(argv)
    check_budget(args)
    plan = sampling_plan(args, presets=SIT_PRESETS, diffusion=False)
    files = mark_dits(args, stitched_files(args, plan, three=False))
    plan = flow_plan(args, plan, files)
    tune(args, plan, files, two_way_ratios(), partial(load_flows, given=given_words(args)))


if __name__ == "__main__":
    run(main)
