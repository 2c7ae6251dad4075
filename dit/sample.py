"""Sample pictures with one DiT.

python dit/sample.py --preset emoji                                    # the bundled large model
python dit/sample.py --model DiT-XL/2 --ckpt DiT-XL-2-256x256.pt --class-labels 207 360
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import DIT_CONFIGS, load_denoisers
from tstitch.cli import (
    OUTPUT,
    add_dry_run_arg,
    add_model_args,
    add_posenc_arg,
    add_sampling_args,
    choose_file,
    help_group,
    new_parser,
    run,
    sampling_plan,
)
from tstitch.files import check_folder
from tstitch.sheet import sample_sheet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_model_args(parser, DIT_CONFIGS)
    add_posenc_arg(parser)
    help_group(parser, OUTPUT).add_argument("--save_dir", type=Path, default=Path("samples"), help="folder to write")
    add_sampling_args(parser)
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    plan = sampling_plan(args)
    file = choose_file(args, plan)
    check_folder(args.save_dir)
    (denoiser,) = load_denoisers(plan, [file], args.posenc)
    sample_sheet(args.save_dir, plan, denoiser, file)


if __name__ == "__main__":
    run(main)
