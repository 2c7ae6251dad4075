"""Train a SiT, on extracted features or on pictures.

    python sit/train.py --features-path data/emoji/features --model emoji-small --max-steps 3800 --results-dir runs/sit-emoji-small --autoresume
    accelerate launch --config_file dit/configs/multi_gpu.yaml sit/train.py --features-path features --model SiT-XL/2 --mixed-precision bf16

Features come from dit/extract_features.py. A run that was killed goes on with --autoresume, to the same weights; --ckpt starts a run from another run's
model, moving average, optimizer and flow. results-dir gets config.json, log.jsonl, checkpoints/ and, with --eval-every, previews/. --export writes the
moving average as safetensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.models import POSITION_ENCODINGS
from sit.checkpoints import SIT_CONFIGS, build_sit, said_by
from sit.cli import TRANSPORT_WORDS, add_transport_args, transport_from, transport_words
from sit.flows import walk_euler
from tstitch.checkpoints import read_checkpoint, save_weights
from tstitch.cli import MODEL, help_group, new_parser, run
from tstitch.errors import InputError
from tstitch.files import read_json
from tstitch.monitor import add_monitor_args, create_monitor
from tstitch.training_cli import add_training_args, training_plan


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    model = help_group(parser, MODEL)
    model.add_argument("--model", choices=SIT_CONFIGS, default="SiT-XL/2", help="model size")
    model.add_argument("--posenc", choices=POSITION_ENCODINGS, default="abs", help="position encoding: added, rotary, or GTA's")
    model.add_argument("--num-classes", type=int, help="classes of the label table, at least those of the data (default: the data's)")
    model.add_argument("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null label, 0..1")
    add_transport_args(parser)
    add_training_args(parser, results_dir="runs/sit")
    add_monitor_args(parser)
    return parser.parse_args(argv)


def flow_said(args: argparse.Namespace) -> dict[str, Any]:
    """The flow of the run that goes on, or of the weights that it starts from; {} where there are none."""
    begun = args.results_dir / "config.json"
    if args.autoresume and begun.exists():  # the file that the run began with may be gone
        return {word: value for word, value in read_json(begun).items() if word in TRANSPORT_WORDS}
    source = args.load_ckpt or args.init_from
    return said_by(read_checkpoint(source)) if source else {}


def main(argv: list[str] | None = None) -> None:
    """Build, train, export."""
    args = parse_args(argv)
    if not 0 <= args.label_dropout < 1:
        raise InputError(f"--label-dropout must lie in [0, 1), got {args.label_dropout}")
    transport = transport_from(args, flow_said(args), args.load_ckpt or args.init_from or args.results_dir)
    transport.check_trainable()
    plan = training_plan(args)
    num_classes = plan.num_classes(args.num_classes)
    torch.manual_seed(args.global_seed)
    channels, size, _ = plan.data.latent_shape
    model = build_sit(args.model, input_size=size, in_channels=channels, num_classes=num_classes, class_dropout_prob=args.label_dropout, posenc=args.posenc)
    model.gradient_checkpointing = args.gradient_checkpointing

    def losses(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        x_1, y = plan.batch(step, part)
        x_0, u = plan.to_device(torch.randn(x_1.shape)), plan.to_device(torch.rand(len(y)))
        return {"loss": transport.training_losses(model, x_1, {"y": y}, x_0, u)["loss"].mean()}

    words = transport_words(transport)
    monitor = create_monitor(args, plan, model, lambda num_steps: walk_euler(transport, num_steps))
    average = plan.fit(model, losses, config={"model_config": model.config, **words}, evaluate=monitor, eval_every=args.eval_every)
    if plan.accelerator.is_main_process and not args.dry_run:
        print(f"{args.model} after {plan.max_steps} steps of {args.global_batch_size}: {args.results_dir}")
        if args.export:
            save_weights(args.export, average, model.config | words)
            print(f"moving average -> {args.export}")


if __name__ == "__main__":
    run(main)
