"""Sample with a small DiT that hands over to a large one, at one ratio or at all of them.

    python dit/sample_t_stitch.py --preset emoji --all_tradeoffs            # 11 ratios of the bundled small and large model
    python dit/sample_t_stitch.py --preset emoji --three_combo 0.4 0.2 0.4  # small 40 %, base 20 %, large 40 % of the steps
    python dit/sample_t_stitch.py --ratio 0.4 --s_ckpt dit_s.pt --xl_ckpt DiT-XL-2-256x256.pt

Writes grid.png (rows labels, columns schedules), results.json and, where the quality is known, tradeoff.png. All schedules start from the same noise. The
seconds are those of each schedule alone: steps times the step times of the denoisers, measured here, plus decoding.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.cli import (
    OUTPUT,
    add_dry_run_arg,
    add_ratio_args,
    add_sampling_args,
    add_switch_arg,
    add_weights_args,
    choose_ratios,
    help_group,
    new_parser,
    run,
    sampling_plan,
    stitched_files,
)
from tstitch.files import check_folder
from tstitch.tradeoff import compare_and_save


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_ratio_args(parser)
    add_switch_arg(parser)
    add_weights_args(parser)
    help_group(parser, OUTPUT).add_argument("--save_dir", type=Path, help="folder to write (default: figures/seed_SEED)")
    add_sampling_args(parser)
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    schedules = [replace(schedule, switch_by=args.switch_by) for schedule in choose_ratios(args)]
    plan = sampling_plan(args)
    files = stitched_files(args, plan, three=bool(args.three_combo))
    folder = args.save_dir or Path("figures") / f"seed_{args.seed}"
    check_folder(folder)
    compare_and_save(folder, plan, load_denoisers(plan, files), files, schedules)


if __name__ == "__main__":
    run(main)
