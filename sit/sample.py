"""Sample pictures with one SiT, along an ODE or an SDE.

    python sit/sample.py ODE --preset emoji                                # the bundled large model, dopri5
    python sit/sample.py SDE --preset emoji --num-sampling-steps 50
    python sit/sample.py ODE --model SiT-XL/2 --ckpt SiT-XL-2-256x256.pt --sampling-method heun2 --class-labels 207 360

With an adaptive ODE method each picture is walked alone, so that it does not depend on the others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sit.checkpoints import SIT_CONFIGS, flow_plan, load_flows
from sit.cli import add_equation_args, given_words
from tstitch.cli import OUTPUT, add_dry_run_arg, add_model_args, add_sampling_args, choose_file, help_group, new_parser, run, sampling_plan
from tstitch.files import check_folder
from tstitch.presets import SIT_PRESETS
from tstitch.sheet import sample_sheet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_equation_args(parser, reverse=True)
    add_model_args(parser, SIT_CONFIGS)
    help_group(parser, OUTPUT).add_argument("--save_dir", type=Path, default=Path("samples"), help="folder to write")
    add_sampling_args(parser, diffusion=False)
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    plan = sampling_plan(args, presets=SIT_PRESETS, diffusion=False)
    file = choose_file(args, plan)
    check_folder(args.save_dir)
    plan = flow_plan(args, plan, [file])
    (denoiser,) = load_flows(plan, [file], given_words(args))
    sample_sheet(args.save_dir, plan, denoiser, file)


if __name__ == "__main__":
    run(main)
