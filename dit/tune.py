"""Find the schedule of small, (base,) and large DiT for a budget: the best within a latency, or the fastest within a loss of quality.

    python dit/tune.py --preset emoji --speed-up 1.5            # the best schedule that is 1.5 times as fast as the large model alone
    python dit/tune.py --preset emoji --latency 0.1             # the best within 0.1 s for a picture, on this machine; --num-images N: N made together
    python dit/tune.py --preset emoji --max-loss 5              # the fastest whose FD-emoji is at most 5 % above the large model's
    python dit/tune.py --speed-up 2 --num-sampling-steps 100    # weights whose quality nobody measured: the least of the small model that is fast enough

A step of each model is measured here; every schedule's cost is then a sum. Chosen from the 11 ratios and, where there is a base model, the mixes of three.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from dit.sweep_emoji import RATIOS, THREE_MODEL_MIXES
from tstitch.budget import add_budget_args, check_budget, tune
from tstitch.cli import add_sampling_args, add_weights_args, new_parser, run, sampling_plan, stitched_files
from tstitch.schedule import two_way_ratios


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_budget_args(parser, "dit")
    add_weights_args(parser)
    add_sampling_args(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, measure, choose."""
    args = parse_args(argv)
    check_budget(args)
    plan = sampling_plan(args)
    three = bool(args.b_ckpt) or len(plan.preset.denoisers) == 3
    files = stitched_files(args, plan, three=three)
    tune(args, plan, files, [*RATIOS, *THREE_MODEL_MIXES] if three else two_way_ratios(), load_denoisers)


if __name__ == "__main__":
    run(main)
