"""Find the ratio of a small and a large U-Net for a budget: the best within a latency, or the fastest within a loss of quality.

    python ldm/scripts/tune.py --preset emoji --speed-up 1.3
    python ldm/scripts/tune.py --preset emoji --max-loss 5

An evaluation of each model is measured here; the cost of each of the 11 ratios is then a sum.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.cli import add_ldm_args, hand_over, ldm_plan
from tstitch.budget import add_budget_args, check_budget, tune
from tstitch.cli import add_sampling_args, new_parser, run
from tstitch.schedule import two_way_ratios


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_budget_args(parser, "ldm")
    add_ldm_args(parser)
    add_sampling_args(parser, diffusion=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, measure, choose."""
    args = parse_args(argv)
    check_budget(args)
    plan, files, load = ldm_plan(args)
    tune(args, plan, files, hand_over(args, plan, two_way_ratios()), load)


if __name__ == "__main__":
    run(main)
