"""Train a DiT, on extracted features or on pictures.

    python dit/train.py --features-path data/emoji/features --model emoji-small --max-steps 3800 --results-dir runs/dit-emoji-small --autoresume
    accelerate launch --config_file dit/configs/multi_gpu.yaml dit/train.py --features-path features --model DiT-XL/2 --mixed-precision bf16

A run that was killed goes on with --autoresume, to the same weights. results-dir gets config.json, log.jsonl, checkpoints/ and, with --eval-every,
previews/. --export writes the moving average as safetensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import DIT_CONFIGS, build_dit
from dit.models import POSITION_ENCODINGS
from tstitch.checkpoints import save_weights
from tstitch.cli import MODEL, OPTIMIZATION, help_group, new_parser, run
from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.monitor import add_monitor_args, create_monitor
from tstitch.training import snr_weights
from tstitch.training_cli import add_training_args, training_plan


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    model = help_group(parser, MODEL)
    model.add_argument("--model", choices=DIT_CONFIGS, default="DiT-XL/2", help="model size")
    model.add_argument("--posenc", choices=POSITION_ENCODINGS, default="abs", help="position encoding: added, rotary, or GTA's")
    model.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, help="RMSNorm on q and k (default: as published, for rope and gta; GTA's abs too)")
    model.add_argument("--num-classes", type=int, help="classes of the label table, at least those of the data (default: the data's)")
    model.add_argument("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null label, 0..1")
    loss = help_group(parser, OPTIMIZATION)
    loss.add_argument("--snr-gamma", type=float, help="weigh the loss by min(SNR, gamma) / SNR (Hang et al. 2023, arXiv:2303.09556); off if not given")
    loss.add_argument(
        "--stitch-range", type=float, nargs=2, default=[0.0, 1.0], metavar=("A", "B"),
        help="part of the trajectory to learn, 0 = pure noise, 1 = data: 0 0.4 for a small model that only takes the first 40 %% of the steps",
    )  # fmt: skip
    add_training_args(parser, results_dir="runs/dit")
    add_monitor_args(parser)
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that would fail, or train nonsense, later."""
    if not 0 <= args.label_dropout < 1:
        raise InputError(f"--label-dropout must lie in [0, 1), got {args.label_dropout}")
    if args.snr_gamma is not None and not args.snr_gamma > 0:
        raise InputError(f"--snr-gamma must be above 0, got {args.snr_gamma}")
    a, b = args.stitch_range
    if not (0 <= a <= 1 and 0 <= b <= 1 and round((1 - b) * 1000) < round((1 - a) * 1000)):
        raise InputError(f"--stitch-range needs 0 <= A < B <= 1, a timestep of the 1000 or more apart; got {a} {b}")


def main(argv: list[str] | None = None) -> None:
    """Build, train, export."""
    args = parse_args(argv)
    check_arguments(args)
    plan = training_plan(args)
    num_classes = plan.num_classes(args.num_classes)
    torch.manual_seed(args.global_seed)
    channels, size, _ = plan.data.latent_shape
    model = build_dit(
        args.model, input_size=size, in_channels=channels, num_classes=num_classes, class_dropout_prob=args.label_dropout, posenc=args.posenc,
        qk_norm=args.qk_norm,
    )  # fmt: skip
    model.gradient_checkpointing = args.gradient_checkpointing
    diffusion = create_diffusion("")
    weights = snr_weights(diffusion.alphas_cumprod, args.snr_gamma).to(plan.accelerator.device)
    # Progress a..b of the trajectory is t = (1 - b) T .. (1 - a) T - 1.
    last, first = (round((1 - progress) * diffusion.num_timesteps) for progress in args.stitch_range)

    def losses(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        x_0, y = plan.batch(step, part)
        t = torch.randint(first, last, (len(y),))
        noise, t = plan.to_device(torch.randn(x_0.shape)), plan.to_device(t)
        terms = diffusion.training_losses(model, x_0, t, {"y": y}, noise=noise)
        return {"loss": (terms["loss"] * weights[t]).mean(), "mse": terms["mse"].mean()}

    config = {"model_config": model.config, "snr_gamma": args.snr_gamma, "stitch_range": args.stitch_range}
    average = plan.fit(model, losses, config=config, evaluate=create_monitor(args, plan, model), eval_every=args.eval_every)
    if plan.accelerator.is_main_process and not args.dry_run:
        print(f"{args.model} after {plan.max_steps} steps of {args.global_batch_size}: {args.results_dir}")
        if args.export:
            save_weights(args.export, average, model.config)
            print(f"moving average -> {args.export}")


if __name__ == "__main__":
    run(main)
