"""Sample many pictures along many stitched schedules, for FID, on any number of processes.

    torchrun --nproc-per-node 8 dit/sample_ddp_t_stitch.py                                       # small and large at ratios 0.0, 0.1, ..., 1.0
    torchrun --nproc-per-node 8 dit/sample_ddp_t_stitch.py --three_combo                         # small, base, large: all 66 shares in tenths
    python dit/sample_ddp_t_stitch.py --preset emoji --ratios 0 0.5 --num-fid-samples 1000 --sample-dir samples/emoji

Writes ratio_0.30.npz or S0.4_B0.2_XL0.4.npz (arr_0, uint8 N x H x W x 3, what ADM's evaluation reads) and a .json of the same name for each schedule.
All schedules see the same noise and labels, from global seed + i for picture i, and are walked as one tree. The same command goes on after a kill, to
the same bytes, on any number of processes, and does nothing when all is there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.cli import STITCHING, add_switch_arg, add_weights_args, help_group, new_parser, run, sampling_plan, stitched_files
from tstitch.generate import add_generation_args, file_names, generate, join_ranks
from tstitch.schedule import StitchSchedule, three_way_allocations


def three_shares(text: str) -> tuple[float, ...]:
    """Argument type: the shares of small, base and large."""
    try:
        small, base, large = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected three shares such as 0.4,0.2,0.4, got '{text}'") from None
    return small, base, large


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    stitch = help_group(parser, STITCHING).add_mutually_exclusive_group()
    stitch.add_argument("--ratios", type=float, nargs="+", metavar="R", default=[k / 10 for k in range(11)], help="the small model's shares of the steps, 0..1")
    stitch.add_argument("--three_combo", action="store_true", help="all 66 shares of small, base and large in tenths")
    stitch.add_argument("--fractions", type=three_shares, nargs="+", metavar="S,B,L", help="some shares of small, base and large, such as 0.4,0.2,0.4")
    add_switch_arg(parser)
    add_weights_args(parser)
    add_generation_args(parser, Path("samples/ddp_t_stitch"))
    return parser.parse_args(argv)


def choose_schedules(args: argparse.Namespace) -> list[StitchSchedule]:
    """Schedules that the command line asks for."""
    if args.three_combo:
        schedules = three_way_allocations()
    elif args.fractions:
        schedules = [StitchSchedule(shares) for shares in args.fractions]
    else:
        schedules = [StitchSchedule.from_ratio(ratio) for ratio in args.ratios]
    return [replace(schedule, switch_by=args.switch_by) for schedule in schedules]


def main(argv: list[str] | None = None) -> None:
    """Check, then generate."""
    args = parse_args(argv)
    with join_ranks() as ranks:
        with ranks.agree():
            schedules = choose_schedules(args)
            plan = sampling_plan(args, fid=True)
            files = stitched_files(args, plan, three=args.three_combo or args.fractions is not None)
            named = file_names(schedules, files)
        generate(ranks, args, plan, files, named, load_denoisers)


if __name__ == "__main__":
    run(main)
