"""The words of every trainer's command line, and what they amount to: data, steps, batches, a call of `fit`."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tstitch.checkpoints import read_checkpoint, read_training_state, read_weights
from tstitch.cli import DATA, LOGGING, MACHINE, MODEL, OPTIMIZATION, add_dry_run_arg, help_group, positive_int
from tstitch.data import Features, ImageLatents, class_weights, open_features
from tstitch.dry_run import Files, Work, checkpoint_files_of, plan_training, show_plan, training_bytes, training_memory
from tstitch.errors import InputError
from tstitch.files import alone_in, check_file, check_folder
from tstitch.pictures import ImageFolder
from tstitch.training import Prefetcher, cosine_lr, draw_batch, fit

TRACKERS = ("none", "tensorboard", "wandb")


def add_training_args(parser: argparse.ArgumentParser, results_dir: str) -> None:
    """Add the words that every training script shares; `training_plan` reads them."""
    data = help_group(parser, DATA)
    data.add_argument("--features-path", type=Path, help="features from extract_features.py; the VAE is then not needed")
    data.add_argument("--data-path", type=Path, help="folder of class folders of pictures, encoded while training (slower)")
    data.add_argument("--image-size", type=positive_int, default=256, help="height and width the pictures are cropped to; with --data-path")
    data.add_argument("--vae", default="ema", help="ema or mse, a diffusers folder, a hub name, or none for pixels; with --data-path or --eval-every")
    data.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the pictures; with --data-path")
    data.add_argument("--num-workers", type=positive_int, default=4, help="threads that read pictures, in each process; with --data-path")
    data.add_argument("--class-balance", type=float, default=0.0, help="0: every item once an epoch; 1 draws classes evenly, 0.5 in between")
    learning = help_group(parser, OPTIMIZATION)
    learning.add_argument("--max-steps", type=positive_int, help="optimizer steps (default: 400000 where --epochs is not given)")
    learning.add_argument("--epochs", type=positive_int, help="passes over the data, in place of --max-steps")
    learning.add_argument("--global-batch-size", type=positive_int, default=256, help="items a step, over all processes and accumulated parts")
    learning.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="parts that each process computes one after another")
    learning.add_argument("--global-seed", type=int, default=0, help="seed of initialisation, batches, timesteps and noise")
    learning.add_argument("--lr", type=float, default=1e-4, help="peak learning rate, above 0")
    learning.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    learning.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up")
    learning.add_argument("--adam-betas", type=float, nargs=2, default=[0.9, 0.999], help="AdamW's moment decays, 0..1")
    learning.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's weight decay, at least 0")
    learning.add_argument("--clip-norm", type=float, default=0.0, help="largest gradient norm; 0 for no clipping")
    learning.add_argument("--ema-decay", type=float, default=0.9999, help="decay of the moving average, 0..1")
    begin = help_group(parser, MODEL).add_mutually_exclusive_group()
    begin.add_argument("--init-from", type=Path, metavar="FILE", help="start from these weights, not at random: a second round, or fine-tuning")
    begin.add_argument(
        "--load-ckpt", "--ckpt", type=Path, metavar="FILE", help="start from another run's checkpoint (model, ema, opt: DiT, fast-DiT, GTA, SiT or ours)"
    )
    speed = help_group(parser, MACHINE)
    speed.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], help="autocast type (default: what accelerate launch says, or no)")
    speed.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TensorFloat-32 for what stays float32 on a GPU")
    speed.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice to keep fewer of them")
    speed.add_argument("--compile", action="store_true", help="torch.compile the model: minutes at the start, faster steps")
    run = help_group(parser, LOGGING)
    run.add_argument("--results-dir", type=Path, default=Path(results_dir), help="run folder")
    run.add_argument("--autoresume", action="store_true", help="go on from the newest checkpoint in results-dir")
    run.add_argument("--ckpt-every", type=positive_int, default=5000, help="steps between checkpoints")
    run.add_argument("--keep", type=positive_int, default=2, help="checkpoints to keep")
    run.add_argument("--log-every", type=positive_int, default=100, help="steps between lines of log.jsonl")
    run.add_argument("--report-to", choices=TRACKERS, default="none", help="also log there; wandb reads WANDB_KEY, ENTITY and PROJECT, where they are set")
    run.add_argument("--wandb", dest="report_to", action="store_const", const="wandb", help="the same as --report-to wandb")
    run.add_argument("--export", type=Path, metavar="FILE", help="write the moving average here at the end, fp16 safetensors")
    add_dry_run_arg(parser)


@runtime_checkable
class Watcher(Protocol):
    """What evaluates a model while it trains, and can say what that costs."""

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Evaluate."""

    def work(self, model: nn.Module, times: int) -> list[Work]:
        """What `times` evaluations cost."""


@dataclass(frozen=True)
class TrainingPlan:
    """Checked training arguments, with the data open."""

    args: argparse.Namespace
    accelerator: Accelerator
    data: Features
    weights: Tensor | None
    max_steps: int
    part_size: int
    prefetch: bool  # draw the next batch while this one is computed

    @property
    def num_parts(self) -> int:
        """Parts of a global batch: processes times accumulation."""
        return self.accelerator.num_processes * self.args.gradient_accumulation_steps

    def num_classes(self, wanted: int | None) -> int:
        """Classes of the label table: --num-classes, or those of the data.

        Raises:
            InputError: if the data has more.
        """
        if wanted is not None and wanted < self.data.num_classes:
            raise InputError(f"--num-classes {wanted} is less than the data's {self.data.num_classes}; leave it out or raise it")
        return self.data.num_classes if wanted is None else wanted

    def batch(self, step: int, part: int) -> tuple[Tensor, Tensor]:
        """Latents (n, C, h, w) and labels (n,) of a part of a step, on the device; what a part draws first, see `Prefetcher`."""
        latents, labels = self._prefetcher.take(step, part) if self.prefetch else self._draw(step, part)
        return self.to_device(latents), self.to_device(labels)

    def to_device(self, drawn: Tensor) -> Tensor:
        """A tensor that was drawn on the CPU, since other devices give other numbers for the same seed; a GPU need not stop for it."""
        device = self.accelerator.device
        # From other memory than pinned a copy waits for all that the GPU has been given before.
        return (drawn.pin_memory() if device.type == "cuda" and not drawn.is_pinned() else drawn).to(device, non_blocking=True)

    def _draw(self, step: int, part: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        index = draw_batch(
            self.weights, len(self.data), step=step, part=part, num_parts=self.num_parts, size=self.part_size, seed=self.args.global_seed, generator=generator
        )  # fmt: skip
        latents, labels = self.data.latents(index, generator), self.data.labels[index]
        if self.accelerator.device.type != "cuda":
            return latents, labels
        return latents.pin_memory(), labels.pin_memory()

    @cached_property
    def _prefetcher(self) -> Prefetcher:
        return Prefetcher(self._draw, self._following, self.args.global_seed, self.accelerator.device)

    def _following(self, step: int, part: int) -> tuple[int, int] | None:
        """What this process computes after a part of a step."""
        if (part + 1) % self.args.gradient_accumulation_steps:
            return step, part + 1
        return (step + 1, part + 1 - self.args.gradient_accumulation_steps) if step + 1 < self.max_steps else None

    def fit(
        self,
        model: nn.Module,
        losses: Callable[[nn.Module, int, int], dict[str, Tensor]],
        config: dict[str, Any],
        evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
        eval_every: int = 0,
    ) -> dict[str, Tensor]:
        """Call `tstitch.training.fit` with what the command line asked for; `config` is what else describes the run, "model_config" among it."""
        args = self.args
        if args.compile and not args.dry_run:
            model.compile()
        with self._alone():
            if not args.dry_run:
                self._start_tracker()
            average = fit(
                model, losses, accelerator=self.accelerator, folder=args.results_dir, config=self._described() | config,
                optimizer=torch.optim.AdamW(
                    model.parameters(), lr=args.lr, betas=tuple(args.adam_betas), weight_decay=args.weight_decay,
                    fused=self.accelerator.device.type in ("cpu", "cuda"),
                ),
                lr_factor=lambda step: cosine_lr(step, self.max_steps, args.warmup_steps, floor=1.0 if args.lr_schedule == "constant" else 0.0),
                max_steps=self.max_steps, items_per_step=args.global_batch_size, accumulation=args.gradient_accumulation_steps, ema_decay=args.ema_decay,
                clip_norm=args.clip_norm or None, seed=args.global_seed, ckpt_every=args.ckpt_every, keep=args.keep, log_every=args.log_every,
                evaluate=evaluate, eval_every=eval_every, resume=args.autoresume, start_from=self._start_from(config),
                rehearse=partial(self._plan, model, evaluate, eval_every) if args.dry_run else None,
            )  # fmt: skip
            self.accelerator.end_training()
        return average

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other runs out of the run folder; what its first process refuses, all refuse."""
        refusal: InputError | None = None
        with ExitStack() as held:
            if self.accelerator.is_main_process and not self.args.dry_run:
                try:
                    held.enter_context(alone_in(self.args.results_dir))
                except InputError as error:
                    refusal = error
            refused = self.accelerator.reduce(torch.tensor(float(refusal is not None), device=self.accelerator.device), "sum")
            if refused.item():
                raise refusal or InputError(f"another run is filling {self.args.results_dir}")
            yield

    def _plan(
        self, model: nn.Module, evaluate: Callable[[nn.Module, int], dict[str, float]] | None, eval_every: int, take: Callable[[], object], start: int
    ) -> None:  # fmt: skip
        """Answer --dry-run: what the steps from `start` on will cost."""
        args, device, processes = self.args, self.accelerator.device, self.accelerator.num_processes

        def take_part(size: int) -> None:
            whole = self.part_size
            object.__setattr__(self, "part_size", size)  # which no one else may change
            take()
            object.__setattr__(self, "part_size", whole)

        works, how = plan_training(take_part, self.part_size, times=(self.max_steps - start) * self.num_parts, device=device, processes=processes)
        how += ", with drawing its batch but without writing"
        if isinstance(evaluate, Watcher):
            whole_intervals = self.max_steps // eval_every - start // eval_every
            model.eval()
            works += evaluate.work(model, whole_intervals + (start < self.max_steps and self.max_steps % eval_every > 0))
            model.train()
        elif evaluate is not None:
            how += " and without previews"
        if not self.accelerator.is_main_process:
            return
        source = args.features_path or args.data_path
        shared = f"{processes} processes x " * (processes > 1) + f"{args.gradient_accumulation_steps} parts of {self.part_size}"
        begun = f", {self.max_steps - start} of them left" if start else ""
        epochs = f"{self.max_steps * args.global_batch_size / len(self.data):.3g} epochs"
        precision = self.accelerator.mixed_precision
        about = [
            ("model", f"{args.model}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g} M parameters"),
            ("data", f"{len(self.data)} items, latents {'x'.join(map(str, self.data.latent_shape))}, {self.data.num_classes} classes, {source}"),
            ("training", f"{self.max_steps} steps of {args.global_batch_size} items ({shared}), {epochs}{begun}"),
            ("learning", f"lr {args.lr:g} {args.lr_schedule}, warm-up {args.warmup_steps} steps, {precision} mixed precision, on {device}"),
        ]
        files = checkpoint_files_of(model, args.results_dir, steps=self.max_steps - start, every=args.ckpt_every, keep=args.keep)
        if args.export:
            files.append(Files("exported weights", 2 * sum(value.numel() for value in model.state_dict().values()), args.export.parent))
        show_plan(
            about,
            works,
            how=how,
            memory=training_memory(device, training_bytes(model)),
            files=files,
            ranks=processes,
        )

    def _start_tracker(self) -> None:
        """Begin the run of --report-to; for wandb with the environment variables of the published trainers, each of which may be missing."""
        name, folder = self.args.results_dir.name, str(self.args.results_dir.resolve())
        # A resumed run goes on in its own curve, and two runs of the same name in two.
        wandb: dict[str, Any] = {"name": name, "id": str(int(hashlib.sha256(folder.encode()).hexdigest(), 16) % 10**8), "resume": "allow"}
        if "ENTITY" in os.environ:
            wandb["entity"] = os.environ["ENTITY"]
        if self.args.report_to == "wandb" and "WANDB_KEY" in os.environ:
            os.environ.setdefault("WANDB_API_KEY", os.environ["WANDB_KEY"])  # the name that wandb itself reads
        project = os.environ.get("PROJECT", name) if self.args.report_to == "wandb" else name
        self.accelerator.init_trackers(project, config={k: str(v) for k, v in vars(self.args).items()}, init_kwargs={"wandb": wandb})

    def _start_from(self, config: dict[str, Any]) -> Callable[[], dict[str, Any]] | None:
        """Read --load-ckpt or --init-from, when it is needed; `config` is what describes the run, "model_config" among it."""
        path = self.args.load_ckpt or self.args.init_from
        if path is None:
            return None

        def read() -> dict[str, Any]:
            begin = read_training_state(path) if self.args.load_ckpt else {"model": read_weights(path)[0]}
            said = read_checkpoint(path)
            told = said.config or said.arguments
            model = config.get("model_config", {})
            differ = [f"{key} {told[key]}, not {model[key]}" for key in ("posenc", "qk_norm", "num_heads") if key in told and told[key] != model.get(key)]
            if differ:
                raise InputError(f"{path} was trained with {', '.join(differ)}; pass the same values")
            flow = (said.arguments | said.config).get("path_type")
            if self.args.load_ckpt and told and flow != config.get("path_type"):
                raise InputError(f"{path} was trained as a {'SiT' if flow else 'DiT'}, whose optimizer is of no use here; pass it with --init-from")
            return {"source": path, **begin}

        return read

    def _described(self) -> dict[str, Any]:
        """The arguments that decide what is learned; where files lie, and how often they are written, may change on a resume."""
        described = (
            "class_balance", "global_batch_size", "global_seed", "lr", "lr_schedule", "warmup_steps", "adam_betas", "weight_decay", "clip_norm", "ema_decay",
            "tf32", "compile", "gradient_checkpointing",
        )  # fmt: skip
        data = {key: value for key, value in self.data.index.items() if key not in ("vae", "class_names")}  # the VAE's hash says which it is
        return {key: getattr(self.args, key) for key in described} | {"data": data}


def check_training_args(args: argparse.Namespace) -> None:
    """Refuse values that would fail, or train nonsense, later.

    Raises:
        InputError: naming the flags.
    """
    ranges = {
        "--lr": 0 < args.lr < math.inf,
        "--adam-betas": all(0 <= beta < 1 for beta in args.adam_betas),
        "--weight-decay": args.weight_decay >= 0,
        "--ema-decay": 0 <= args.ema_decay < 1,
        "--clip-norm": args.clip_norm >= 0,
        "--class-balance": 0 <= args.class_balance <= 1,
        "--warmup-steps": args.warmup_steps >= 0,
    }
    wrong = [flag for flag, right in ranges.items() if not right]
    if wrong:
        given = ", ".join(f"{flag} {getattr(args, flag[2:].replace('-', '_'))}" for flag in wrong)
        raise InputError(f"{given} {'is' if len(wrong) == 1 else 'are'} out of range; --help gives the ranges")
    if (args.features_path is None) == (args.data_path is None):
        raise InputError("name the training data: either --features-path (from extract_features.py) or --data-path (a folder of class folders)")
    if args.max_steps and args.epochs:
        raise InputError("--max-steps and --epochs say the same thing; pass one of them")
    if (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16" and not torch.cuda.is_available():
        raise InputError("fp16 training needs a CUDA device; pass --mixed-precision bf16 or no")
    if args.export is not None:
        if args.export.suffix != ".safetensors":
            raise InputError(f"--export writes safetensors, got {args.export}; name a .safetensors file")
        check_file(args.export)
    check_folder(args.results_dir)
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report-to {args.report_to} needs that package; pip install {args.report_to}, or leave it out: log.jsonl is always written")


def create_accelerator(mixed_precision: str | None, tf32: bool, report_to: str, logs: Path) -> Accelerator:
    """The processes' group, its number type, and the tracker of --report-to, which writes to `logs`.

    Raises:
        InputError: if processes were started that do not work together.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    world = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        mixed_precision=mixed_precision, project_dir=logs, log_with=None if report_to == "none" else report_to,
        cpu=world > 1 and not torch.cuda.is_available(),  # else accelerate would make each process a run of its own
    )  # fmt: skip
    if accelerator.num_processes != world:
        raise InputError(f"{world} processes were started, but only {accelerator.num_processes} work together; start them with torchrun or accelerate launch")
    return accelerator


def training_plan(args: argparse.Namespace) -> TrainingPlan:
    """Check the arguments, open the data, start the processes' group.

    Raises:
        InputError: for the first argument that cannot be used.
    """
    check_training_args(args)
    accelerator = create_accelerator(args.mixed_precision, args.tf32, args.report_to, args.results_dir)
    parts = accelerator.num_processes * args.gradient_accumulation_steps
    if args.global_batch_size % parts:
        raise InputError(
            f"--global-batch-size {args.global_batch_size} is not divisible by {parts}: {accelerator.num_processes} processes, "
            f"{args.gradient_accumulation_steps} accumulated parts each"
        )  # fmt: skip
    data: Features
    if args.features_path:
        data = open_features(args.features_path)
    else:
        data = ImageLatents(ImageFolder(args.data_path, args.image_size), args.vae, accelerator.device, args.num_workers, args.flip)
    epoch_steps = len(data) / args.global_batch_size
    return TrainingPlan(
        args=args,
        accelerator=accelerator,
        data=data,
        weights=class_weights(data.labels, args.class_balance) if args.class_balance else None,
        max_steps=max(1, round(args.epochs * epoch_steps)) if args.epochs else args.max_steps or 400_000,
        part_size=args.global_batch_size // parts,
        # On a CPU it would compete with the step for the cores, and MPS bears one thread; a dry run takes one step over and over.
        prefetch=accelerator.device.type == "cuda" and not args.dry_run,
    )
