"""Sample with a small SiT that hands over to a large one, along an ODE or an SDE, at one ratio or at all of them.

    python sit/sample_t_stitch.py ODE --preset emoji --all_tradeoffs --sampling-method heun2 --num-sampling-steps 11
    python sit/sample_t_stitch.py ODE --preset emoji --ratio 0.4                # dopri5: starts anew where the models change
    python sit/sample_t_stitch.py SDE --preset emoji --all_tradeoffs
    python sit/sample_t_stitch.py ODE --preset emoji --all_tradeoffs --s_ckpt pretrained_models/emoji/dit-small.safetensors

The last one carries a small DiT over to the flow of the large SiT. Writes grid.png (rows labels, columns schedules), results.json with the evaluations of
each model, and, where the quality is known, tradeoff.png. All schedules start from the same noise. The seconds are those of each schedule alone:
evaluations times their seconds, measured here, plus decoding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sit.checkpoints import flow_plan, load_flows, mark_dits
from sit.cli import add_dit_arg, add_equation_args, given_words
from tstitch.cli import (
    OUTPUT,
    add_dry_run_arg,
    add_ratio_args,
    add_sampling_args,
    add_weights_args,
    choose_ratios,
    help_group,
    new_parser,
    run,
    sampling_plan,
    stitched_files,
)
from tstitch.files import check_folder
from tstitch.presets import SIT_PRESETS
from tstitch.tradeoff import compare_and_save


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_equation_args(parser)
    add_ratio_args(parser)
    add_weights_args(parser)
    add_dit_arg(parser)
    help_group(parser, OUTPUT).add_argument("--save_dir", type=Path, help="folder to write (default: figures/sit_seed_SEED)")
    add_sampling_args(parser, diffusion=False)
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    schedules = choose_ratios(args)
    plan = sampling_plan(args, presets=SIT_PRESETS, diffusion=False)
    files = mark_dits(args, stitched_files(args, plan, three=bool(args.three_combo)))
    folder = args.save_dir or Path("figures") / f"sit_seed_{args.seed}"
    check_folder(folder)
    plan = flow_plan(args, plan, files)
    compare_and_save(folder, plan, load_flows(plan, files, given_words(args)), files, schedules)


if __name__ == "__main__":
    run(main)
