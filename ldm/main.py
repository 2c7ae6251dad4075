"""Train a latent diffusion U-Net, or its first stage, with Lightning, from LDM's own yaml files.

    python ldm/main.py --base ldm/configs/emoji-small.yaml -t --run-dir runs/ldm-small
    python ldm/main.py --base ldm/configs/emoji-vq.yaml -t data.params.train.pictures=FOLDER     # a first stage
    python ldm/main.py --base ldm/configs/cin-ldm-vq-f8.yaml -t --devices 8 --accelerator gpu data.params.train.pictures=FOLDER
    python ldm/main.py --resume runs/ldm-small                                   # the same run goes on, to the same weights
    python ldm/main.py --base ldm/configs/emoji-small.yaml                       # without -t: say what would be trained

Configurations are merged from left to right, then key=value overrides. The run folder gets config.yaml, log.jsonl, images/ and checkpoints/ with CompVis'
names in them: last.ckpt, and where there are validation data the best by model.params.monitor. The learning rate is accumulation x devices x batch size
x base_learning_rate, unless --scale_lr false.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import re
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tstitch.cli import LOGGING, MACHINE, add_dry_run_arg, help_group, new_parser, run, yes_or_no
from tstitch.errors import InputError
from tstitch.torchvision_compat import prepare_torchvision

prepare_torchvision()  # Lightning imports it where it is installed
import pytorch_lightning as pl

from ldm.config import read_yaml
from ldm.experiment import LOGGERS, build_experiment

TRAINER_FLAGS = {
    "accelerator": "auto, cpu, gpu, mps", "devices": "how many processes, or their devices: 2, 0,1, auto", "num_nodes": "how many machines",
    "strategy": "how several devices share the work: ddp", "precision": "32-true, bf16-mixed, 16-mixed", "max_steps": "optimizer steps",
    "max_epochs": "passes over the data", "max_time": "end after DD:HH:MM:SS", "accumulate_grad_batches": "batches that one step adds up",
    "gradient_clip_val": "largest gradient norm", "val_check_interval": "batches, or share of an epoch, between validations",
    "check_val_every_n_epoch": "epochs between validations", "limit_val_batches": "most batches of a validation",
    "log_every_n_steps": "steps between lines of log.jsonl", "enable_progress_bar": "true or false", "benchmark": "let cuDNN choose by trying",
}  # fmt: skip
OWN_FLAGS = {"logger", "callbacks", "default_root_dir", "plugins"}  # arguments of Lightning's Trainer that this script gives itself


def trainer_value(text: str) -> Any:  # noqa: ANN401  (whatever Lightning takes)
    """Argument type: a value as in yaml; 1e4 is a number, a time stays as it is written."""
    if re.fullmatch(r"\d+e\d+", text):
        return int(float(text))
    for number in (int, float):  # 1e-1 is no number in yaml
        with contextlib.suppress(ValueError):
            return number(text)
    try:
        return text if ":" in text else yaml.safe_load(text)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"'{text}' is no value; write it as in a yaml file") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    switch = {"nargs": "?", "type": yes_or_no, "const": True, "default": False, "metavar": "true|false"}
    config = help_group(parser, "what is trained")
    config.add_argument("-b", "--base", nargs="*", action="extend", metavar="YAML", help="configurations, merged from left to right")
    config.add_argument("-t", "--train", **(switch | {"default": None}), help="train; without it only say what would be")
    config.add_argument("--init-from", type=Path, metavar="CKPT", help="start from the weights of this checkpoint, not at random")
    config.add_argument("-s", "--seed", type=int, help="seed of initialisation, batches, timesteps and noise (default: 23, or the run's)")
    config.add_argument("--scale_lr", type=yes_or_no, help="base_learning_rate counts for one item: times batch size, devices, accumulation (default: true)")
    config.add_argument("--no-test", **switch, help="taken for LDM's sake: no test follows training here")
    config.add_argument("-p", "--project", help=argparse.SUPPRESS)
    log = help_group(parser, LOGGING)
    where = log.add_mutually_exclusive_group()
    where.add_argument("-n", "--name", help="end of the run folder's name (default: that of the first configuration)")
    where.add_argument("-r", "--resume", type=Path, help="run folder, or a checkpoint in one, to go on with; its own configuration comes before --base")
    where.add_argument("--run-dir", type=Path, help="this run folder, without a date; a run that is there goes on, if it was begun with the same values")
    log.add_argument("-f", "--postfix", help="put behind the run folder's name")
    log.add_argument("-l", "--logdir", type=Path, default=Path("logs"), help="folder of run folders")
    log.add_argument("--export", type=Path, metavar="FILE", help="write the moving average here at the end, fp16 safetensors")
    log.add_argument("--logger", nargs="+", choices=LOGGERS, help="Lightning's loggers, besides log.jsonl")
    help_group(parser, MACHINE).add_argument("-d", "--debug", **switch, help="open the debugger where training fails")
    add_dry_run_arg(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the configurations, such as data.params.batch_size=8")
    trainer = parser.add_argument_group("Lightning's Trainer", "Its arguments, these and all others, go over lightning.trainer of the configuration.")
    for name in inspect.signature(pl.Trainer).parameters:
        if name not in OWN_FLAGS:
            trainer.add_argument(f"--{name}", type=trainer_value, metavar="VALUE", help=TRAINER_FLAGS.get(name, argparse.SUPPRESS))
    trainer.add_argument("--gpus", type=trainer_value, metavar="N", help="the old word: --accelerator gpu --devices N, or the devices 0,1")
    args = parser.parse_intermixed_args(_with_values(sys.argv[1:] if argv is None else argv))
    # A list of files swallows the overrides that follow it.
    given = args.base or []
    args.overrides += [text for text in given if _is_override(text)]
    args.base = [text for text in given if not _is_override(text)]
    if args.project is not None:
        raise InputError("-p/--project does nothing in LDM either; leave it out, and name the run with --name or --run-dir")
    if not args.base and args.resume is None:
        raise InputError("no configuration; pass --base ldm/configs/emoji-small.yaml, or --resume a run folder")
    if args.resume is not None and args.train is False:
        raise InputError("--resume goes on with the training, -t false asks for none; leave one of them out")
    if args.resume is not None and args.init_from is not None:
        raise InputError("--resume goes on from the run's own weights, so --init-from has no use; leave one of them out")
    if args.export is not None and not args.train and args.resume is None:
        raise InputError("--export writes what was trained, and nothing is without -t; add it")
    return args


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).is_file()


def _with_values(argv: list[str]) -> list[str]:
    """`-t key=value` as `-t true key=value`: a switch takes the next word for its value only where that is a truth value."""
    full: list[str] = []
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        full.append(word)
        if word in ("-t", "--train", "-d", "--debug", "--no-test") and not _is_truth_value(following):
            full.append("true")
    return full


def _is_truth_value(text: str) -> bool:
    try:
        yes_or_no(text)
    except argparse.ArgumentTypeError:
        return False
    return True


def find_run(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint that it goes on from, None for a new run.

    Raises:
        InputError: if there is no run to resume.
    """
    folder = args.run_dir or args.logdir / f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_{args.name or Path((args.base or ['run'])[0]).stem}{args.postfix or ''}"
    if args.resume is not None and args.resume.is_file():
        return args.resume.absolute().parents[1], args.resume
    if args.resume is not None:
        folder = args.resume
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists() and args.resume is not None:
        raise InputError(f"{folder} holds no checkpoints/last.ckpt; pass the folder of a run that has saved one")
    return folder, last if last.exists() else None


def main(argv: list[str] | None = None) -> None:
    """Read, build, train, export."""
    args = parse_args(argv)
    folder, resumed = find_run(args)
    own = [folder / "config.yaml"] if args.resume is not None else []
    content = read_yaml([*own, *args.base], args.overrides)
    began = content.get("run") or {}
    flags = {name: getattr(args, name) for name in [*inspect.signature(pl.Trainer).parameters, "gpus"] if getattr(args, name, None) is not None}
    flags.pop("logger", None)
    experiment = build_experiment(
        content,
        folder,
        flags,
        seed=began.get("seed", 23) if args.seed is None else args.seed,
        scale_lr=began.get("scale_lr", True) if args.scale_lr is None else args.scale_lr,
        init_from=args.init_from or began.get("init_from"),
        resumed=resumed,
        same=args.resume is None,
        loggers=args.logger or (),
    )
    if experiment.trainer.is_global_zero:
        print(experiment.describe(), flush=True)
    if args.dry_run:
        experiment.plan(args.export)
        return
    if experiment.trainer.is_global_zero and not args.train and args.resume is None:
        print("nothing was trained; add -t")
    if args.train or args.resume is not None:
        try:
            experiment.fit(args.export)
        except InputError:
            raise
        except Exception:
            if args.debug:
                import pdb

                pdb.post_mortem()
            raise


if __name__ == "__main__":
    run(main)
