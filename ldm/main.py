"""Train a latent diffusion U-Net, or its first stage, with Lightning, from LDM's own yaml files.

    python ldm/main.py --base ldm/configs/emoji-small.yaml -t --run-dir runs/ldm-small
    python ldm/main.py --base ldm/configs/cin-ldm-vq-f8.yaml -t --devices 8 --accelerator gpu data.params.train.features=features
    python ldm/main.py --resume runs/ldm-small                                   # the same run goes on, to the same weights
    python ldm/main.py --base ldm/configs/emoji-small.yaml                       # without -t: say what would be trained

Configurations are merged from left to right, then key=value overrides. The run folder gets config.yaml, log.jsonl, images/ and checkpoints/ with CompVis'
names in them. The learning rate is accumulation x devices x batch size x base_learning_rate, unless --scale_lr false.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.cli import new_parser, run
from tstitch.errors import InputError
from tstitch.torchvision_compat import prepare_torchvision

prepare_torchvision()  # Lightning imports it where it is installed
import pytorch_lightning as pl

from ldm.config import read_yaml
from ldm.experiment import build_experiment

OWN_FLAGS = {"logger", "callbacks", "default_root_dir", "plugins"}  # flags of Lightning's Trainer that this script sets itself


def yes_or_no(text: str) -> bool:
    """Argument type: what LDM takes for a truth value."""
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return text.lower() in ("yes", "true", "t", "y", "1")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="YAML", help="configurations, merged from left to right")
    parser.add_argument("-t", "--train", nargs="?", type=yes_or_no, const=True, default=False, help="train; without it only say what would be")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-n", "--name", default="", help="end of the run folder's name (default: that of the first configuration)")
    where.add_argument("-r", "--resume", type=Path, help="run folder, or a checkpoint in one, to go on with; it has its own configuration")
    where.add_argument("--run-dir", type=Path, help="this run folder, without a date; a run that is there goes on")
    parser.add_argument("-f", "--postfix", default="", help="put behind the run folder's name")
    parser.add_argument("-l", "--logdir", type=Path, default=Path("logs"), help="folder of run folders")
    parser.add_argument("-s", "--seed", type=int, default=23, help="seed of initialisation, batches, timesteps and noise")
    parser.add_argument("--scale_lr", type=yes_or_no, default=True, help="base_learning_rate counts for one item: times batch size, devices, accumulation")
    parser.add_argument("--init-from", type=Path, metavar="CKPT", help="start from the weights of this checkpoint, not at random")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the moving average here at the end, fp16 safetensors")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the configurations, such as data.params.batch_size=8")
    trainer = parser.add_argument_group("flags of Lightning's Trainer (over lightning.trainer of the configuration)")
    for name in inspect.signature(pl.Trainer).parameters:
        if name not in OWN_FLAGS:
            trainer.add_argument(f"--{name}", type=yaml.safe_load, help=argparse.SUPPRESS if name in ("profiler", "barebones") else f"Trainer({name}=...)")
    args = parser.parse_intermixed_args(argv)
    if not args.base and args.resume is None:
        raise InputError("no configuration; pass --base ldm/configs/emoji-small.yaml, or --resume a run folder")
    return args


def main(argv: list[str] | None = None) -> None:
    """Read, build, train, export."""
    args = parse_args(argv)
    folder = args.run_dir or args.logdir / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_{args.name or Path((args.base or ['run'])[0]).stem}{args.postfix}"
    resumed = None
    if args.resume is not None:
        folder = args.resume if args.resume.is_dir() else args.resume.parents[1]
        resumed = args.resume if args.resume.is_file() else folder / "checkpoints" / "last.ckpt"
    elif (folder / "checkpoints" / "last.ckpt").exists():
        resumed = folder / "checkpoints" / "last.ckpt"
    if resumed is not None and not resumed.exists():
        raise InputError(f"{folder} holds no checkpoints/last.ckpt; pass the folder of a run that has saved one")
    content = read_yaml(args.base or [folder / "config.yaml"], args.overrides)
    flags = {name: getattr(args, name) for name in inspect.signature(pl.Trainer).parameters if getattr(args, name, None) is not None}
    experiment = build_experiment(content, folder, flags, seed=args.seed, scale_lr=args.scale_lr, init_from=args.init_from, resumed=resumed)
    print(experiment.describe())
    if args.train or args.resume is not None:
        experiment.fit(args.export)


if __name__ == "__main__":
    run(main)
