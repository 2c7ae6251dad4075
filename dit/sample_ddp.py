"""Sample many pictures with one DiT, for FID, on any number of processes.

    torchrun --nproc-per-node 8 dit/sample_ddp.py --ckpt DiT-XL-2-256x256.pt         # 50000 pictures, as published: 250 steps, scale 1.5
    python dit/sample_ddp.py --preset emoji --num-fid-samples 1000 --sample-dir samples/emoji

Writes MODEL.npz (arr_0, uint8 N x H x W x 3, what ADM's evaluation reads) and MODEL.json. Picture i and its label come from global seed + i alone. The
same command goes on after a kill, to the same bytes, on any number of processes, and does nothing when all is there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import DIT_CONFIGS, load_denoisers
from tstitch.cli import add_model_args, add_posenc_arg, choose_file, new_parser, run, sampling_plan
from tstitch.generate import add_generation_args, generate, join_ranks
from tstitch.schedule import StitchSchedule


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_model_args(parser, DIT_CONFIGS)
    add_posenc_arg(parser)
    add_generation_args(parser, Path("samples/ddp"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, then generate."""
    args = parse_args(argv)
    with join_ranks() as ranks:
        with ranks.agree():
            plan = sampling_plan(args, fid=True, solver="ddpm")  # as published
            file = choose_file(args, plan)
        load = partial(load_denoisers, posenc=args.posenc)
        generate(ranks, args, plan, [file], {file.model.replace("/", "-"): StitchSchedule((1.0,))}, load)


if __name__ == "__main__":
    run(main)
