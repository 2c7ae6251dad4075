"""Train a DiT on extracted features.

    python dit/train.py --features-path data/emoji/features --model emoji-small --max-steps 12000 --results-dir runs/dit-emoji-small --autoresume
    accelerate launch dit/train.py --features-path features --model DiT-XL/2 --max-steps 400000

A run that was killed goes on with --autoresume, to the same weights. results-dir gets config.json, log.jsonl and checkpoints/; --export writes the
moving average as safetensors.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import DIT_CONFIGS, build_dit
from tstitch.checkpoints import load_strict, read_weights, save_weights
from tstitch.cli import new_parser, positive_int, run
from tstitch.data import FeatureStore, class_weights
from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.training import cosine_lr, fit, snr_weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--features-path", type=Path, required=True, help="feature folder (index.json, moments.npy, labels.npy)")
    data.add_argument("--class-balance", type=float, default=0.0, help="0 draws items evenly, 1 draws classes evenly, 0.5 in between")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=DIT_CONFIGS, default="DiT-XL/2", help="model size")
    model.add_argument("--init-from", metavar="FILE", help="start from these weights, not at random: a second round, or fine-tuning")
    model.add_argument("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null label, 0..1")
    training = parser.add_argument_group("training")
    training.add_argument("--results-dir", type=Path, default=Path("runs/dit"), help="run folder")
    training.add_argument("--max-steps", type=positive_int, default=400_000, help="optimizer steps")
    training.add_argument("--global-batch-size", type=positive_int, default=256, help="items a step, over all processes")
    training.add_argument("--lr", type=float, default=1e-4, help="peak learning rate, above 0")
    training.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    training.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    training.add_argument("--adam-betas", type=float, nargs=2, default=[0.9, 0.999], help="AdamW's moment decays, 0..1")
    training.add_argument("--snr-gamma", type=float, help="weigh the loss by min(SNR, gamma) / SNR (Hang et al. 2023, arXiv:2303.09556); off if not given")
    training.add_argument("--ema-decay", type=float, default=0.9999, help="decay of the moving average, 0..1")
    training.add_argument("--clip-norm", type=float, default=1.0, help="largest gradient norm; 0 for no clipping")
    training.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no", help="autocast type")
    training.add_argument("--global-seed", type=int, default=0, help="seed of initialisation, batches, timesteps and noise")
    training.add_argument("--ckpt-every", type=positive_int, default=500, help="steps between checkpoints")
    training.add_argument("--keep", type=positive_int, default=2, help="checkpoints to keep")
    training.add_argument("--log-every", type=positive_int, default=50, help="steps between lines of log.jsonl")
    training.add_argument("--autoresume", action="store_true", help="go on from the newest checkpoint in results-dir")
    training.add_argument("--export", type=Path, metavar="FILE", help="write the moving average here at the end, fp16 safetensors")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that would fail, or train nonsense, later."""
    ranges = {
        "--lr": 0 < args.lr < math.inf,
        "--adam-betas": all(0 <= beta < 1 for beta in args.adam_betas),
        "--label-dropout": 0 <= args.label_dropout < 1,
        "--ema-decay": 0 <= args.ema_decay < 1,
        "--snr-gamma": args.snr_gamma is None or args.snr_gamma > 0,
        "--clip-norm": args.clip_norm >= 0,
        "--class-balance": 0 <= args.class_balance <= 1,
        "--warmup-steps": args.warmup_steps >= 0,
    }
    wrong = [flag for flag, right in ranges.items() if not right]
    if wrong:
        raise InputError(f"{', '.join(wrong)} out of range; --help gives the ranges")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("fp16 training needs a CUDA device; pass --mixed-precision bf16 or no")


def main(argv: list[str] | None = None) -> None:
    """Build, train, export."""
    args = parse_args(argv)
    check_arguments(args)
    store = FeatureStore(args.features_path)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if args.global_batch_size % accelerator.num_processes:
        raise InputError(f"--global-batch-size {args.global_batch_size} is not divisible by {accelerator.num_processes} processes")
    torch.manual_seed(args.global_seed)
    model = build_dit(
        args.model, input_size=store.latent_shape[-1], in_channels=store.latent_shape[0], num_classes=store.num_classes,
        class_dropout_prob=args.label_dropout,
    )  # fmt: skip
    if args.init_from:
        load_strict(model, read_weights(args.init_from)[0], args.init_from)
    diffusion = create_diffusion("")
    weights = class_weights(store.labels, args.class_balance)
    timestep_weights = snr_weights(diffusion.alphas_cumprod, args.snr_gamma).to(accelerator.device)
    batch = args.global_batch_size // accelerator.num_processes

    def losses(model: nn.Module, step: int) -> dict[str, Tensor]:
        index = torch.multinomial(weights, batch, replacement=True)
        t = torch.randint(diffusion.num_timesteps, (batch,))
        x_0, noise, y, t = (v.to(accelerator.device) for v in (store.latents(index), torch.randn(batch, *store.latent_shape), store.labels[index], t))
        terms = diffusion.training_losses(model, x_0, t, {"y": y}, noise=noise)
        loss = (terms["loss"] * timestep_weights[t]).mean()
        return {"loss": loss, "mse": terms["mse"].mean()}

    config = {k: v for k, v in vars(args).items() if k not in {"features_path", "results_dir", "autoresume", "export", "ckpt_every", "keep", "log_every"}}
    ema = fit(
        model, losses, accelerator=accelerator, folder=args.results_dir, config=config | {"model_config": model.config, "features": store.index},
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr, betas=tuple(args.adam_betas), weight_decay=0.0),
        lr_factor=lambda step: cosine_lr(step, args.max_steps, args.warmup_steps, floor=1.0 if args.lr_schedule == "constant" else 0.0),
        max_steps=args.max_steps, ema_decay=args.ema_decay, clip_norm=args.clip_norm or None, seed=args.global_seed,
        ckpt_every=args.ckpt_every, keep=args.keep, log_every=args.log_every, resume=args.autoresume,
    )  # fmt: skip
    if args.export and accelerator.is_main_process:
        save_weights(args.export, ema.state_dict(), model.config)
        print(f"{args.model} after {args.max_steps} steps of {args.global_batch_size} -> {args.export}")


if __name__ == "__main__":
    run(main)
