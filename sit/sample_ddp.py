"""Sample many pictures with one SiT, or stitched ones, for FID, on any number of processes; or measure the likelihood of data.

    torchrun --nproc-per-node 8 sit/sample_ddp.py ODE --ckpt SiT-XL-2-256x256.pt                   # 50000 pictures, dopri5, no guidance, as published
    python sit/sample_ddp.py SDE --preset emoji --num-fid-samples 1000 --ratios 0 0.3 0.5 --sample-dir samples/sit
    python sit/sample_ddp.py ODE --preset emoji --cfg-scale 1 --likelihood --features-path data/emoji/features --sample-dir samples/likelihood

Writes MODEL.npz, or ratio_0.30.npz for each of --ratios (arr_0, uint8 N x H x W x 3, what ADM's evaluation reads), and a .json of the same name. Picture
i and its label come from global seed + i alone, but with an adaptive ODE method the pictures of a batch share their steps. The same command
goes on after a kill, to the same bytes, on any number of processes, and does nothing when all is there. --likelihood writes likelihood.json.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sit.checkpoints import SIT_CONFIGS, flow_plan, load_flows, mark_dits
from sit.cli import add_dit_arg, add_equation_args, given_words
from sit.likelihood import add_likelihood_args, measure_likelihood, open_likelihood_data, wants_likelihood
from sit.transport import ODE
from tstitch.checkpoints import file_hash
from tstitch.cli import STITCHING, SamplingPlan, add_model_args, add_weights_args, choose_file, help_group, new_parser, run, sampling_plan, stitched_files
from tstitch.errors import InputError
from tstitch.generate import Ranks, add_generation_args, file_names, generate, join_ranks
from tstitch.presets import SIT_PRESETS, DenoiserFile
from tstitch.schedule import StitchSchedule


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_equation_args(parser)
    add_model_args(parser, SIT_CONFIGS)
    help_group(parser, STITCHING).add_argument(
        "--ratios", type=float, nargs="+", metavar="R", help="the small model's shares of the steps, 0..1 (default: one model alone)"
    )
    add_weights_args(parser)
    add_dit_arg(parser)
    add_likelihood_args(parser)
    add_generation_args(parser, Path("samples/sit_ddp"), diffusion=False)
    return parser.parse_args(argv)


def choose(args: argparse.Namespace, plan: SamplingPlan) -> tuple[list[DenoiserFile], dict[str, StitchSchedule]]:
    """Models and named schedules that the command line asks for.

    Raises:
        InputError: if it asks for one model and for stitching.
    """
    if args.ratios is None:
        if args.s_ckpt or args.b_ckpt or args.xl_ckpt or args.dit:
            raise InputError("--s_ckpt, --b_ckpt, --xl_ckpt and --dit belong to --ratios; pass --ckpt for one model")
        file = choose_file(args, plan)
        return [file], {file.model.replace("/", "-"): StitchSchedule((1.0,))}
    if args.model or args.ckpt or args.likelihood:
        raise InputError("--model, --ckpt and --likelihood belong to one model; leave --ratios out")
    files = mark_dits(args, stitched_files(args, plan, three=False))
    return files, file_names([StitchSchedule.from_ratio(ratio) for ratio in args.ratios], files)


def likelihood(ranks: Ranks, args: argparse.Namespace, plan: SamplingPlan, file: DenoiserFile) -> None:
    """Measure the likelihood of data under one model."""
    with ranks.agree():
        (model,) = load_flows(plan, [file], given_words(args), prepare=False)
        data = open_likelihood_data(args, image_size=plan.image_size, num_classes=plan.num_classes, vae=plan.vae, device=plan.device)
    ode: ODE = plan.walker.ode
    measure_likelihood(
        ranks, args, model, plan.walker.transport, data, method=ode.method, num_steps=plan.num_steps, atol=ode.atol, rtol=ode.rtol, seed=args.seed,
        batch=args.per_proc_batch_size, folder=args.sample_dir, device=plan.device,
        settings={"model": file.model, "weights": file_hash(file.path), "dtype": args.dtype},
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Check, then generate or measure."""
    args = parse_args(argv)
    with join_ranks() as ranks:
        with ranks.agree():
            plan = sampling_plan(args, fid=True, presets=SIT_PRESETS, diffusion=False)
            files, schedules = choose(args, plan)
            measures = wants_likelihood(args, equation=args.mode, cfg_scale=plan.guidance.scale)
            plan = flow_plan(args, plan, files, alone=False)
            if measures and args.dry_run:
                raise InputError("--dry-run plans pictures, not --likelihood; leave one of the two out")
        if measures:
            likelihood(ranks, args, plan, files[0])
        else:
            generate(ranks, args, plan, files, schedules, partial(load_flows, given=given_words(args)))


if __name__ == "__main__":
    run(main)
