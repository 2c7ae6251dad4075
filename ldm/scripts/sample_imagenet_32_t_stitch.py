"""Sample with a small U-Net that hands over to a large one, at one ratio or at all of them.

    python ldm/scripts/sample_imagenet_32_t_stitch.py --ratio 0.4                    # LDM-S and LDM: 8 pictures of each of 4 classes, as published
    python ldm/scripts/sample_imagenet_32_t_stitch.py --all_ratios                   # 11 ratios, one picture of each class
    python ldm/scripts/sample_imagenet_32_t_stitch.py --preset emoji --all_ratios    # the bundled models

Writes grid.png (rows labels, columns schedules), results.json and, where the quality is known, tradeoff.png. All schedules start from the same noise. The
seconds are those of each schedule alone: evaluations times their seconds, measured here, plus decoding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.cli import add_ldm_args, hand_over, ldm_plan
from tstitch.cli import OUTPUT, SAMPLING, STITCHING, add_dry_run_arg, add_sampling_args, help_group, new_parser, run
from tstitch.files import check_folder
from tstitch.schedule import StitchSchedule, two_way_ratios
from tstitch.tradeoff import compare_and_save


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    stitch = help_group(parser, STITCHING).add_mutually_exclusive_group()
    stitch.add_argument("--ratio", type=float, default=0.4, help="the small model's share of the steps, 0..1")
    stitch.add_argument("--all_ratios", action="store_true", help="ratios 0.0, 0.1, ..., 1.0")
    add_ldm_args(parser)
    help_group(parser, OUTPUT).add_argument("--save_dir", type=Path, help="folder to write (default: figures/ldm_seed_SEED)")
    help_group(parser, SAMPLING).add_argument("--sampling-steps", type=int, dest="num_sampling_steps", metavar="N", help="--num-sampling-steps, as published")
    add_sampling_args(parser, diffusion=False)
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    schedules = two_way_ratios() if args.all_ratios else [StitchSchedule.from_ratio(args.ratio)]
    plan, files, load = ldm_plan(args, each=1 if args.all_ratios else 8)
    schedules = hand_over(args, plan, schedules)
    folder = args.save_dir or Path("figures") / f"ldm_seed_{args.seed}"
    check_folder(folder)
    compare_and_save(folder, plan, load(plan, files), files, schedules)


if __name__ == "__main__":
    run(main)
