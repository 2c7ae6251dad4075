"""What every command line shares: a parser that explains itself, one-sentence errors, and the words for seeds, devices and number types."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from tstitch.autoencoder import NAMED_VAES, PIXELS, Source
from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance, SizedDenoiser
from tstitch.noise import SampleNoise
from tstitch.presets import PRESETS, RECIPES, DenoiserFile, Preset, Recipe, get_preset, get_recipe
from tstitch.schedule import RULES, StitchSchedule, two_way_ratios
from tstitch.solvers import SOLVERS, Solver, create_solver
from tstitch.sweep import UNMEASURED
from tstitch.walker import SolverWalker, Walker

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the docstring's line breaks and show defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.help if action.default is None else super()._get_help_string(action)
        return said and re.sub(r" \(default: [^)%]*\)(?= \(default: %)", "", said)  # a script's own default in place of the usual one


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, with the flag that was probably meant, in place of the list of all flags."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence, and exit with 2."""
        begin, is_unknown, unknown = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")] if is_unknown and not begin else []
        meant = list(dict.fromkeys(match for flag in flags for match in get_close_matches(flag, self._option_string_actions, n=1)))
        self.exit(2, f"error: {message}; " + (f"did you mean {', '.join(meant)}? " if meant else "") + "--help lists what there is\n")


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser whose description is the script's docstring; abbreviated flags are errors, not guesses."""
    return _Parser(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)


def help_group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of that title in --help, where several functions put their flags; it begins where it is first asked for."""
    return next((group for group in parser._action_groups if group.title == title), None) or parser.add_argument_group(title)


# Titles of the groups in which --help shows flags, where several scripts have them: samplers', trainers', everyone's.
MODELS, STITCHING, OUTPUT = "models", "stitching", "output"
SAMPLED, SAMPLING = "what is sampled", "sampling"
DATA, MODEL, OPTIMIZATION, LOGGING = "data", "model", "optimization", "logging and checkpoints"
MACHINE = "machine"


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def yes_or_no(text: str) -> bool:
    """Argument type: what published scripts take for a truth value."""
    if text.lower() not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return text.lower() in ("yes", "true", "t", "y", "1")


class YesNo(argparse.BooleanOptionalAction):
    """--name and --no-name; and --name true or false, as some published scripts have it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (argparse's own)
        super().__init__(*args, **kwargs)
        self.nargs, self.type = "?", yes_or_no

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:  # noqa: ANN401
        """Store the word's own value, or the one behind it."""
        says_no = (option_string or "").startswith("--no-")  # argparse has none for positional arguments alone
        if says_no and values is not None:
            parser.error(f"argument {option_string} takes no value")
        setattr(namespace, self.dest, not says_no if values is None else values)


def run(main: Callable[[], None]) -> None:
    """Run a script: input that cannot be used, or that the device has no memory for, becomes one sentence on stderr and exit code 2."""
    code = 0
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except torch.OutOfMemoryError:
        fewer = "a smaller --max-batch, --per-proc-batch-size or --batch-size, or to a trainer a larger --gradient-accumulation-steps"
        print(f"error: out of memory on the device; pass {fewer} (--help lists which there is)", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # A thread of the process group that still lets go of a tensor while the interpreter shuts down aborts the process: leave without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def parse_device(name: str) -> torch.device:
    """Read --device: auto (cuda, then mps, then cpu) or a torch device name; under torchrun each process gets the GPU of its own local rank.

    Raises:
        InputError: if torch knows no such device or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise InputError(f"device '{name}' is not available here; use --device auto, cpu, cuda or mps") from None
    return device


def add_sampling_args(parser: argparse.ArgumentParser, *, fid: bool = False, diffusion: bool = True) -> None:
    """Add the words that every sampling script shares; `sampling_plan` reads them.

    Args:
        fid: count and seed have the names of the published generators.
        diffusion: add the words of diffusion models, --recipe and --solver; a backbone of another kind brings its own.
    """
    labels_help = "classes 0..num_classes-1, which repeat (default: drawn from each picture's seed)" if fid else "one class for each picture, 0..num_classes-1"
    for title in (SAMPLED, SAMPLING):
        help_group(parser, title).description = "defaults come from the preset"
    group = help_group(parser, SAMPLED)
    group.add_argument("--preset", metavar="NAME", help=f"model set: {', '.join(PRESETS)} (default: imagenet of --image-size)")
    if diffusion:
        group.add_argument(
            "--recipe", metavar="NAME",
            help=f"how one model's published number was made, for the defaults of all that follows: {', '.join(RECIPES)}; the number itself is shown only "
            "where nothing overrides it and nothing is stitched",
        )  # fmt: skip
    group.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width of the pictures, a multiple of the latents' and patches' size")
    group.add_argument("--num-classes", type=int, help="number of classes; the null label is this number")
    group.add_argument("--class-labels", type=int, nargs="+", metavar="LABEL", help=labels_help)
    if fid:
        group.add_argument("--num-fid-samples", dest="num_images", type=positive_int, metavar="N", help="pictures of each schedule (default: 50000)")
    else:
        group.add_argument("--num-images", type=int, metavar="N", help="how many pictures; the labels repeat (default: one for each label)")
    group.add_argument("--global-seed" if fid else "--seed", dest="seed", type=int, default=0, metavar="SEED", help="picture i is made from seed + i alone")
    group = help_group(parser, SAMPLING)
    if diffusion:
        group.add_argument("--num-sampling-steps", type=int, metavar="N", help="solver steps, 1..1000 (a single one is taken at t = 0, as published)")
        group.add_argument("--solver", metavar="NAME", help=f"one of {', '.join(SOLVERS)} (default: ddim; ddpm in dit/sample_ddp.py)")
    else:
        group.add_argument("--num-sampling-steps", type=int, metavar="N", help="solver steps, 1..1000; of a flow the times on its grid, 2..1000")
    group.add_argument("--cfg-scale", type=float, help="uncond + scale * (cond - uncond); 1 turns guidance off")
    group.add_argument("--cfg-channels", metavar="N|all", help="how many latent channels are guided; published DiT samples guide 3 of 4")
    group.add_argument("--vae", help="mse or ema (the Stable Diffusion autoencoders), a folder in diffusers format, a hub name, or none for models of pixels")
    group = help_group(parser, MACHINE)
    measured = " (default: those that are walked together)" if fid else " (default: what is fastest, measured while sampling)" if diffusion else ""
    group.add_argument(
        "--max-batch", type=positive_int, default=None if diffusion else UNMEASURED, metavar="N",
        help=f"most pictures in one denoiser call, before guidance doubles them{measured}",
    )  # fmt: skip
    group.add_argument("--dtype", choices=DTYPES, default="fp32", help="number type of the denoisers' weights")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--compile", action="store_true", help="torch.compile the denoisers: a minute for each, once")


def add_dry_run_arg(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run, which `tstitch.dry_run` answers."""
    help_group(parser, MACHINE).add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, its FLOPs, time here (uncompiled), memory and disk; write nothing"
    )


def add_ratio_args(parser: argparse.ArgumentParser) -> None:
    """Add which schedules a stitching script compares; `choose_ratios` reads them."""
    stitch = help_group(parser, STITCHING).add_mutually_exclusive_group()
    stitch.add_argument("--ratio", type=float, default=0.5, help="the small model's share of the steps, 0..1")
    stitch.add_argument("--all_tradeoffs", action="store_true", help="ratios 0.0, 0.1, ..., 1.0")
    stitch.add_argument("--three_combo", type=float, nargs=3, metavar=("SMALL", "BASE", "LARGE"), help="shares of three models, sum 1")


def choose_ratios(args: argparse.Namespace) -> list[StitchSchedule]:
    """Schedules that the command line asks for."""
    if args.three_combo:
        return [StitchSchedule(args.three_combo)]
    return two_way_ratios() if args.all_tradeoffs else [StitchSchedule.from_ratio(args.ratio)]


def add_switch_arg(parser: argparse.ArgumentParser) -> None:
    """Add the rule that cuts a trajectory of training timesteps."""
    help_group(parser, STITCHING).add_argument(
        "--switch-by", choices=RULES[:2], default="step", help="share of the steps, or of the training timesteps (the published DiT rule)"
    )


def add_weights_args(parser: argparse.ArgumentParser) -> None:
    """Add the weights of every stitching script; `stitched_files` reads them."""
    for flag, size in (("s", "small"), ("b", "base"), ("xl", "large")):
        help_group(parser, MODELS).add_argument(f"--{flag}_ckpt", type=Path, metavar="FILE", help=f"weights of the {size} model (default: the preset's)")


@dataclass(frozen=True)
class SamplingPlan:
    """Checked and complete sampling arguments: what `add_sampling_args` asks for, with the preset's values filled in."""

    preset: Preset
    image_size: int
    num_classes: int
    labels: Tensor
    noise: SampleNoise
    num_steps: int
    walker: Walker
    guidance: ClassifierFreeGuidance
    vae: Source
    device: torch.device
    dtype: torch.dtype
    max_batch: int | None  # None: the walker measures
    compile: bool = False
    dry_run: bool = False  # say what it would cost, and do nothing
    recipe: Recipe | None = None  # only where all of it is followed: its published number is shown beside the result
    learned_null: bool = True  # guidance asks the models for the null label that they learned; False where the walker brings another
    also: Mapping[str, object] = field(default_factory=dict)  # settings of the backbone

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // self.preset.downsampling

    @property
    def compiles(self) -> bool:
        """Whether the denoisers shall be compiled; a dry run measures them as they are."""
        return self.compile and not self.dry_run

    @property
    def solver(self) -> Solver:
        """The solver of a diffusion model."""
        assert isinstance(self.walker, SolverWalker), "a walker of another kind has no solver"
        return self.walker.solver

    def check_fit(self, model: Any, path: Path) -> None:  # noqa: ANN401  (a DiT, SiT or LatentDenoiser)
        """Compare a model that was read from `path` with the pictures that are asked for.

        Raises:
            InputError: if it was trained for other pictures or classes, or cannot be guided.
        """
        if model.latent_shape[1] != self.latent_size:
            trained = model.latent_shape[1] * self.preset.downsampling
            raise InputError(f"{path} was trained for {trained}x{trained} pictures, not {self.image_size}x{self.image_size}; pass --image-size {trained}")
        if model.num_classes != self.num_classes:
            raise InputError(f"{path} was trained for {model.num_classes} classes, not {self.num_classes}; pass --num-classes {model.num_classes}")
        has_null_label = model.has_null_label if hasattr(model, "has_null_label") else model.config["class_dropout_prob"] > 0
        if self.guidance.scale != 1 and self.learned_null and not has_null_label:
            raise InputError(f"{path} was trained without label dropout and has no null label to guide from; pass --cfg-scale 1")

    @property
    def settings(self) -> dict[str, object]:
        """What two results must have in common to be compared."""
        settings: dict[str, object] = {
            "preset": self.preset.name, "image_size": self.image_size, **self.walker.settings, "cfg_scale": self.guidance.scale,
            "cfg_channels": self.guidance.channels or "all", **self.also,
        }  # fmt: skip
        return settings | ({"recipe": self.recipe.name} if self.recipe else {})


# How a backbone reads the models of a plan.
Load = Callable[[SamplingPlan, Sequence[DenoiserFile]], Sequence[SizedDenoiser]]

T = TypeVar("T")


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def sampling_plan(
    args: argparse.Namespace,
    *,
    fid: bool = False,
    solver: str = "ddim",
    presets: Mapping[str, Preset] = PRESETS,
    diffusion: bool = True,
) -> SamplingPlan:
    """Check the sampling arguments before anything is loaded, and fill in the recipe's and the preset's values.

    Args:
        args: what `add_sampling_args` asked for.
        fid: take the preset's values for FID, and draw labels that nobody gave from the samples' own seeds.
        solver: the script's default.
        presets: the backbone's model sets.
        diffusion: as it was said to `add_sampling_args`; False leaves the plan's walker to the backbone.

    Raises:
        InputError: for the first argument that cannot be used.
    """
    recipe = get_recipe(args.recipe) if diffusion and args.recipe else None
    preset = get_preset(args.preset or (recipe.preset if recipe else "imagenet512" if args.image_size == 512 else "imagenet256"), presets)
    if fid:
        preset = replace(preset, **preset.for_fid)
    if recipe:
        preset, solver = recipe.fill(preset), recipe.solver
    if args.vae == PIXELS:
        preset = replace(preset, downsampling=1)
    image_size = _given(args.image_size, preset.image_size)
    if image_size < 1 or image_size % preset.downsampling:
        raise InputError(f"--image-size {image_size} is not divisible by {preset.downsampling}, the pixels per latent; choose a multiple")
    num_classes = _given(args.num_classes, preset.num_classes)
    if num_classes < 1:
        raise InputError(f"--num-classes must be at least 1, got {num_classes}")
    drawn = fid and args.class_labels is None
    labels = [] if drawn else list(_given(args.class_labels, preset.labels))
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise InputError(f"class labels {wrong} are out of range; choose from 0..{num_classes - 1}")
    count = _given(args.num_images, (recipe.num_images if recipe else 50_000) if fid else len(labels))
    if count < 1:
        raise InputError(f"the number of pictures must be at least 1, got {count}")
    num_steps = _given(args.num_sampling_steps, preset.num_sampling_steps)
    if not 1 <= num_steps <= 1000:
        raise InputError(f"--num-sampling-steps must lie in 1..1000, got {num_steps}")
    if args.seed < 0:
        raise InputError(f"the seed must not be negative, got {args.seed}")
    cfg_scale = _given(args.cfg_scale, preset.cfg_scale)
    if not math.isfinite(cfg_scale):
        raise InputError(f"--cfg-scale must be a finite number, got {cfg_scale}")
    noise = SampleNoise(range(args.seed, args.seed + count))
    walker = SolverWalker(create_solver(_given(args.solver, solver), create_diffusion(str(num_steps)))) if diffusion else None
    return SamplingPlan(
        preset=preset,
        image_size=image_size,
        num_classes=num_classes,
        labels=noise.labels(num_classes) if drawn else torch.tensor([labels[i % len(labels)] for i in range(count)]),
        noise=noise,
        num_steps=num_steps,
        walker=walker,  # type: ignore[arg-type]  # the backbone that said diffusion=False sets its own before anyone asks
        guidance=ClassifierFreeGuidance(cfg_scale, num_classes, _parse_channels(args.cfg_channels, preset)),
        vae=NAMED_VAES.get(args.vae, args.vae or preset.vae),
        device=parse_device(args.device),
        dtype=DTYPES[args.dtype],
        max_batch=args.max_batch or getattr(args, "per_proc_batch_size", None),
        compile=args.compile,
        dry_run=getattr(args, "dry_run", False),
        recipe=recipe if recipe and _follows(args, recipe, preset, fid) else None,
    )


def _follows(args: argparse.Namespace, recipe: Recipe, preset: Preset, fid: bool) -> bool:
    """Whether a command line asks for what a recipe's number was measured on; `preset` is the one that the recipe filled."""
    told = {name: getattr(recipe, name) for name in ("solver", "num_sampling_steps", "cfg_scale", *(["num_images"] if fid else []))}
    told |= {"model": recipe.model, "image_size": preset.image_size, "num_classes": preset.num_classes, **({"class_labels": None} if fid else {})}
    return (
        hasattr(args, "model")  # scripts that stitch have none
        and all(getattr(args, name) in (None, value) for name, value in told.items())
        and _parse_channels(args.cfg_channels, preset) == recipe.cfg_channels
        and NAMED_VAES.get(args.vae, args.vae) in (None, recipe.vae)
    )


def _parse_channels(text: str | None, preset: Preset) -> int | None:
    if text is None:
        return preset.cfg_channels
    if text != "all" and not text.isdigit():
        raise InputError(f"--cfg-channels is a number or 'all', got '{text}'")
    return None if text == "all" else int(text)


def add_model_args(parser: argparse.ArgumentParser, models: Iterable[str]) -> None:
    """Add the words of scripts with one model; `choose_file` reads them."""
    group = help_group(parser, MODELS)
    group.add_argument("--model", metavar="NAME", help=f"model size: {', '.join(models)} (default: the preset's largest)")
    group.add_argument("--ckpt", type=Path, metavar="FILE", help="weights (default: the preset's for that model)")


def add_posenc_arg(parser: argparse.ArgumentParser) -> None:
    """Add what a GTA checkpoint may not say of itself."""
    help_group(parser, MODELS).add_argument("--posenc", choices=["rope", "gta"], help="position encoding of a GTA checkpoint that does not say it")


def choose_file(args: argparse.Namespace, plan: SamplingPlan) -> DenoiserFile:
    """The one model that --model and --ckpt ask for: the recipe's, or the preset's largest, and the preset's weights unless given.

    Raises:
        InputError: if there are no weights for that model.
    """
    known = {file.model: file for file in plan.preset.denoisers}
    recipe = getattr(args, "recipe", None)  # not the plan's, which is gone where anything else was overridden
    name = args.model or (get_recipe(recipe).model if recipe else plan.preset.denoisers[-1].model)
    if args.ckpt is None and name not in known:
        raise InputError(f"preset {plan.preset.name} has no weights for {name}; pass --ckpt, or choose from {', '.join(known)}")
    return known[name] if args.ckpt is None else DenoiserFile(name, name, args.ckpt)


def stitched_files(args: argparse.Namespace, plan: SamplingPlan, three: bool) -> list[DenoiserFile]:
    """Small and large, or all three, with the paths of the command line in place of the preset's.

    Raises:
        InputError: if there is no base model for three, or one for two.
    """
    small, *base, large = plan.preset.denoisers
    if args.b_ckpt and not three:
        raise InputError("--b_ckpt is the middle one of three models, which this command line does not ask for; leave it out")
    if three and not base:
        if not args.b_ckpt:
            raise InputError(f"preset {plan.preset.name} has no base model; pass one with --b_ckpt")
        base = [DenoiserFile("B", "base", args.b_ckpt)]
    chosen = [(small, args.s_ckpt), *((file, args.b_ckpt) for file in base if three), (large, args.xl_ckpt)]
    return [replace(file, path=path) if path else file for file, path in chosen]
