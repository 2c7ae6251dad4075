"""Sample many pictures with a small U-Net that hands over to a large one, for FID, on any number of processes.

    torchrun --nproc-per-node 8 ldm/scripts/sample_imagenet_ddp_t_stitch.py --ratio 0.5      # LDM-S and LDM, 50000 pictures, as published
    python -m torch.distributed.launch --nproc-per-node 8 --use_env ldm/scripts/sample_imagenet_ddp_t_stitch.py
    python ldm/scripts/sample_imagenet_ddp_t_stitch.py --preset emoji --ratio 0 0.5 1 --num-fid-samples 1000 --sample-dir samples/ldm

Writes ratio_0.50.npz (arr_0, uint8 N x H x W x 3, what ADM's evaluation reads) and a .json of the same name for each ratio. All ratios see the same noise
and labels, from global seed + i for picture i, and are walked as one tree. The same command goes on after a kill, to the same bytes, on any number of
processes, and does nothing when all is there.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.cli import add_ldm_args, hand_over, ldm_plan
from tstitch.cli import MACHINE, STITCHING, help_group, new_parser, run
from tstitch.generate import add_generation_args, file_names, generate, join_ranks
from tstitch.schedule import StitchSchedule


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    help_group(parser, STITCHING).add_argument(
        "--ratio", "--ratios", type=float, nargs="+", default=[0.5], metavar="R", help="the small model's share of the steps, 0..1; or some"
    )
    help_group(parser, MACHINE).add_argument("--local_rank", "--local-rank", type=int, metavar="N", help="what the old launcher passes without --use_env")
    add_ldm_args(parser)
    add_generation_args(parser, Path("samples/ldm_ddp_t_stitch"), diffusion=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, then generate."""
    args = parse_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    with join_ranks() as ranks:
        with ranks.agree():
            schedules = [StitchSchedule.from_ratio(ratio) for ratio in args.ratio]
            plan, files, load = ldm_plan(args, fid=True)
            named = dict(zip(file_names(schedules, files), hand_over(args, plan, schedules), strict=True))
        generate(ranks, args, plan, files, named, load)


if __name__ == "__main__":
    run(main)
