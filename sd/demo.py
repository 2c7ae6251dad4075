"""What the demos share: the words of their command lines, pictures of every ratio from the same noise, a grid with times, results.json.

Picture i is made from seed + i alone: not from its neighbours in a batch, and not from the ratio. So a row of the grid shows what stitching changes and nothing
else.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from sd.sdxl_data import weights_hash
from sd.stitched_unet import steps_of_calls
from sd.tstitch_sd_utils import LARGE_SDXL, OFFLOADS, get_tstitch_pipepline_sdxl_controlnet, load_lora, read_ratio, stitched_unet
from tstitch.checkpoints import first_line
from tstitch.cli import (
    DTYPES,
    MACHINE,
    MODELS,
    OUTPUT,
    SAMPLED,
    SAMPLING,
    STITCHING,
    add_dry_run_arg,
    help_group,
    new_parser,
    parse_device,
    positive_int,
)
from tstitch.dry_run import Files, Watch, Work, flop_counter, module_bytes, show_memory, show_plan
from tstitch.errors import InputError
from tstitch.files import check_folder, read_json, write_json
from tstitch.pictures import to_rgb
from tstitch.plots import image_grid, save_image
from tstitch.results import computed_by, markdown_table
from tstitch.schedule import StitchSchedule, steps_by_denoiser
from tstitch.sweep import owners_of

RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LETTERS = ("S", "L")  # small, large
CELL = 256  # pixels of a picture in the grid, at most
Pictures = list[Image.Image]


def demo_parser(
    doc: str | None, *, prompt: str | None, large: str, steps: int | tuple[int, ...] | None = 50, guidance: float | None = 7.5,
    negative_prompt: str = "", ratios: Sequence[float] | None = RATIOS, max_batch: int | None = 1, save_dir: str,
) -> argparse.ArgumentParser:  # fmt: skip
    """Make a parser with the words that every demo shares; `demo_plan` reads them. The arguments are the demo's defaults; a tuple of steps takes several."""
    parser = new_parser(doc)
    shown = help_group(parser, SAMPLED)
    shown.add_argument("--prompt", nargs="*", default=prompt and [prompt], metavar="TEXT", help="what the pictures shall show, one or more prompts")
    shown.add_argument("--negative_prompt", metavar="TEXT", help=f"what they shall not show; needs guidance (default: {negative_prompt or 'nothing'})")
    parser.set_defaults(usual_negative_prompt=negative_prompt)
    shown.add_argument("--num-images", type=positive_int, metavar="N", help="how many pictures; the prompts repeat (default: one for each prompt)")
    shown.add_argument("--seed", type=int, default=0, help="picture i is made from seed + i alone")
    shown.add_argument("--height", type=positive_int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    shown.add_argument("--width", type=positive_int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    models = help_group(parser, MODELS)
    models.add_argument("--large", default=large, metavar="NAME", help="large model: a hub name, or a folder in diffusers format")
    models.add_argument("--small", metavar="NAME", help="small model: likewise, or a U-Net alone (default: beside the large one, else the published one)")
    models.add_argument("--lora", metavar="NAME", help="a LoRA for the large model: a file, a folder or a hub name")
    help_group(parser, STITCHING).add_argument(
        "--ratios", type=float, nargs="+", default=ratios and list(ratios), metavar="RATIO", help="the small model's share of the steps, 0..1"
    )
    sampling = help_group(parser, SAMPLING)
    several = {"nargs": "+", "default": list(steps)} if isinstance(steps, tuple) else {"default": steps}
    sampling.add_argument("--steps", type=int, metavar="N", help="sampling steps, 1..1000", **several)
    sampling.add_argument("--guidance", type=float, default=guidance, help="uncond + guidance * (cond - uncond); 1 turns guidance off")
    help_group(parser, OUTPUT).add_argument("--save_dir", type=Path, default=Path(save_dir), metavar="FOLDER", help="folder to write")
    machine = help_group(parser, MACHINE)
    machine.add_argument("--max-batch", type=positive_int, default=max_batch, metavar="N", help="most pictures in one call of the pipeline")
    machine.add_argument("--dtype", choices=DTYPES, help="number type of the weights (default: fp16 on cuda, fp32 elsewhere)")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    machine.add_argument("--offload", choices=OFFLOADS, default="none", help="switch: one U-Net on the accelerator at a time; model: one model of any kind")
    add_dry_run_arg(parser)
    return parser


def add_picture_arg(parser: argparse.ArgumentParser, what: str, *, required: bool = True) -> None:
    """Add the pictures that a demo starts from; they repeat as the prompts do."""
    help_group(parser, SAMPLED).add_argument("--image", type=Path, nargs="+", default=[], required=required, metavar="FILE", help=what)


@dataclass(frozen=True)
class DemoPlan:
    """Checked arguments: a prompt, a seed and, where the demo starts from pictures, a picture for each row of the grid."""

    prompts: list[str]
    seeds: list[int]
    pictures: Pictures
    negative_prompt: str
    ratios: list[float]
    steps: int
    counts: list[int]  # every number of steps that is asked for, `steps` the first
    guidance: float
    size: tuple[int | None, int | None]  # width, height; None is the model's own
    max_batch: int
    folder: Path
    large: str
    small: str | None
    lora: str | None
    loading: dict[str, Any]  # what every loader of a stitched pipeline takes
    arguments: dict[str, Any]  # the whole command line, for the record
    dry_run: bool = False  # say what it would cost, and do nothing

    def fitted(self, pipe: DiffusionPipeline, pictures: Sequence[Image.Image] | None = None) -> Pictures:
        """The pictures in the size that the pipeline makes, cut in the middle to its shape."""
        return [ImageOps.fit(picture, self.pixels(pipe)) for picture in (self.pictures if pictures is None else pictures)]

    def pixels(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        """Width and height of what the pipeline makes."""
        own = pipe.unet.config.sample_size  # one number, or height and width
        own = own[::-1] if isinstance(own, (list, tuple)) else (own, own)
        width, height = (side or latents * pipe.vae_scale_factor for side, latents in zip(self.size, own, strict=True))
        return width, height


def demo_plan(args: argparse.Namespace) -> DemoPlan:
    """Check the arguments before anything is loaded.

    Raises:
        InputError: for the first argument that cannot be used.
    """
    if not args.prompt or not all(prompt.strip() for prompt in args.prompt):
        raise InputError('no prompt given, or an empty one; write what the pictures shall show, e.g. --prompt "red heart"')
    for ratio in args.ratios or ():
        StitchSchedule.from_ratio(ratio)
    counts = args.steps if isinstance(args.steps, list) else [args.steps]
    if not all(1 <= steps <= 1000 for steps in counts):
        raise InputError(f"--steps must lie in 1..1000, got {' '.join(map(str, counts))}")
    if not math.isfinite(args.guidance):
        raise InputError(f"--guidance must be a finite number, got {args.guidance}")
    if args.negative_prompt and args.guidance <= 1:
        raise InputError(f"--negative_prompt decides nothing at --guidance {args.guidance:g}; pass more than 1, or leave it out")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63-1, got {args.seed}")
    wrong = [side for side in (args.width, args.height) if side is not None and side % 8]
    if wrong:
        raise InputError(f"--height and --width are multiples of 8, got {wrong[0]}")
    check_folder(args.save_dir)
    paths = getattr(args, "image", [])
    count = args.num_images or max(len(args.prompt), len(paths))
    pictures = [read_picture(path) for path in paths]
    return DemoPlan(
        prompts=[args.prompt[i % len(args.prompt)] for i in range(count)],
        seeds=list(range(args.seed, args.seed + count)),
        pictures=[pictures[i % len(pictures)] for i in range(count)] if pictures else [],
        negative_prompt=args.usual_negative_prompt if args.negative_prompt is None else args.negative_prompt,
        ratios=args.ratios or list(RATIOS),
        steps=counts[0],
        counts=counts,
        guidance=args.guidance,
        size=(args.width, args.height),
        max_batch=args.max_batch,
        folder=args.save_dir,
        large=args.large,
        small=args.small,
        lora=args.lora,
        loading={"device": parse_device(args.device), "dtype": args.dtype and DTYPES[args.dtype], "offload": args.offload},
        dry_run=args.dry_run,
        arguments={name: json.loads(json.dumps(value, default=str)) for name, value in vars(args).items() if name != "dry_run"},
    )


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB, upright as its camera says, what is transparent white.

    Raises:
        InputError: if the file is missing or holds no picture.
    """
    try:
        with Image.open(path) as opened:
            return to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise InputError(f"no picture at {path}; check the path") from None
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise InputError(f"{path} cannot be read as a picture ({first_line(error)}); choose another file") from None


def load_pipeline(loader: Callable[..., DiffusionPipeline], plan: DemoPlan, **how: Any) -> DiffusionPipeline:  # noqa: ANN401
    """The stitched pipeline that a plan asks for, its LoRA in the large U-Net; `loader` is one of `sd.tstitch_sd_utils`, `how` more of its keywords."""
    pipe = loader(plan.large, plan.small, **plan.loading, **how)
    check_steps(pipe, plan.counts)
    if plan.lora:
        load_lora(pipe, plan.lora)
    return pipe


def check_steps(pipe: DiffusionPipeline, counts: Sequence[int]) -> None:
    """Refuse, before anything is sampled, numbers of steps that the pipeline's scheduler cannot take.

    Raises:
        InputError: for the first of them.
    """
    scheduler = pipe.scheduler
    trained = scheduler.config.num_train_timesteps
    for steps in counts:
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, LookupError, ArithmeticError) as error:
            raise InputError(f"--steps {steps} is not for {type(scheduler).__name__} ({first_line(error)}); choose another number") from None
        if scheduler.timesteps.max() > trained - 1:  # an offset moved the first one out of what was trained
            raise InputError(f"--steps {steps} is too many for {type(scheduler).__name__} with its {trained} timesteps; choose fewer")


def sample(pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], *, ratio: float, negative_prompt: str = "", **call: Any) -> Tensor:  # noqa: ANN401
    """Call a stitched pipeline once: picture i shows prompts[i] and is made from seeds[i] alone; `call` goes to the pipeline.

    Returns:
        uint8 (N, 3, H, W), on the CPU.
    """
    # On the CPU: a CUDA generator gives other numbers for the same seed.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = [negative_prompt] * len(prompts)
    made = pipe(list(prompts), negative_prompt=negative, unet_s_ratio=ratio, generator=generators, output_type="pt", **call).images
    return made.float().mul(255).round().to("cpu", torch.uint8)


@dataclass(frozen=True)
class Row:
    """One ratio: steps of the small and the large model, seconds of a picture with text and decoding, speed-up against ratio 0 if that was run too."""

    ratio: float
    name: str
    steps: list[int]
    seconds_per_image: float
    speed_up: float | None
    files: list[str]


def run_demo(
    pipe: DiffusionPipeline,
    plan: DemoPlan,
    shown: Mapping[str, Pictures] | None = None,
    per_picture: Mapping[str, Pictures] | None = None,
    **call: Any,  # noqa: ANN401
) -> None:
    """Sample every ratio, then write the pictures, grid.png and results.json, and print a table.

    Args:
        pipe: a stitched pipeline.
        plan: what to sample.
        shown: columns in front of the ratios: header -> a picture for each row.
        per_picture: arguments of the pipeline with a picture for each row.
        call: arguments of the pipeline that are the same for all rows; they are recorded.
    """
    unet = stitched_unet(pipe)
    pipe.set_progress_bar_config(leave=False, desc="steps")
    call = {"guidance_scale": plan.guidance, "negative_prompt": plan.negative_prompt, **call}
    if not per_picture:
        call |= {"width": plan.size[0], "height": plan.size[1]}
    batches = [slice(i, i + plan.max_batch) for i in range(0, len(plan.seeds), plan.max_batch)]

    def pictures(ratio: float, steps: int, batch: slice) -> Tensor:
        each = {name: values[batch] for name, values in (per_picture or {}).items()}
        return sample(pipe, plan.prompts[batch], plan.seeds[batch], ratio=ratio, num_inference_steps=steps, **call, **each)

    def prepare() -> None:
        for ratio in (0.0, 1.0):  # the first call of a model prepares kernels, and times are shown
            pictures(ratio, min(plan.steps, math.ceil(2 / call.get("strength", 1))), batches[0])

    if plan.dry_run:
        plan_demo(pipe, plan, prepare, len(plan.seeds[batches[0]]), call.get("strength"))
        return
    prepare()
    columns, steps, seconds = [], [], []
    with tqdm(desc="sampling", total=len(plan.ratios) * len(plan.seeds), unit="picture") as bar:
        for ratio in plan.ratios:
            start, made = time.perf_counter(), []
            for batch in batches:
                made.append(pictures(ratio, plan.steps, batch))
                bar.update(len(made[-1]))
            seconds.append((time.perf_counter() - start) / len(plan.seeds))
            columns.append([Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())) for picture in torch.cat(made)])
            taken = steps_by_denoiser(unet.legs, len(unet.unets))
            steps.append([taken[0], taken[-1]])
    alone = seconds[plan.ratios.index(0)] if 0 in plan.ratios else None
    rows = [
        Row(
            ratio=ratio,
            name=StitchSchedule.from_ratio(ratio).describe(LETTERS),
            steps=steps[k],
            seconds_per_image=seconds[k],
            speed_up=None if alone is None else alone / seconds[k],
            files=[f"{i:02d}_ratio_{ratio:g}.png" for i in range(len(plan.seeds))],
        )
        for k, ratio in enumerate(plan.ratios)
    ]
    _save(pipe, plan, rows, columns, dict(shown or {}), call)
    cells = [
        [f"{row.ratio:g}", "/".join(map(str, row.steps)), f"{row.seconds_per_image:.3f}", "-" if row.speed_up is None else f"{row.speed_up:.2f}"]
        for row in rows
    ]
    print(markdown_table(["ratio", "steps small/large", "seconds per image", "speed-up"], cells))
    print(f"wrote {plan.folder}")


def plan_demo(pipe: DiffusionPipeline, plan: DemoPlan, prepare: Callable[[], None], together: int, strength: float | None) -> None:
    """Answer --dry-run, from the short calls that prepare a run, each of `together` pictures."""
    unet, device, count = stitched_unet(pipe), plan.loading["device"], len(plan.seeds)
    legs = {ratio: planned_legs(pipe, ratio, plan.steps, strength) for ratio in plan.ratios}
    modules, works = measure_calls(pipe, device, prepare, together, [(count, calls) for _, calls in legs.values()], prepared=1)
    width, height = plan.pixels(pipe)
    size = 2 * count * len(plan.ratios) * width * height * 3
    show_plan(
        [
            *model_lines(modules),
            ("pictures", f"{count} of {width}x{height} for each ratio, at most {plan.max_batch} at once, seeds {plan.seeds[0]} to {plan.seeds[-1]}"),
            ("schedules", ", ".join(f"{ratio:g}: {'/'.join(map(str, steps))}" for ratio, (steps, _) in legs.items()) + " steps small/large"),
            ("sampling", f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}, guidance {plan.guidance:g}; {unet.dtype} on {device}"),
        ],
        works,
        how=f"an estimate from {together} picture{'s' if together > 1 else ''} at once, without loading and writing",
        memory=show_memory(device, pipeline_bytes(pipe), size),
        files=[Files("pictures, grid.png and results.json", size, plan.folder, at_most=True)],
    )


def model_lines(modules: Mapping[str, torch.nn.Module]) -> list[tuple[str, str]]:
    """A line of a plan for each network."""
    return [
        ("models", f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.4g} M parameters, {module.config._name_or_path}")
        for name, module in modules.items()
    ]


def pipeline_bytes(pipe: DiffusionPipeline) -> float:
    """Bytes of all networks of a pipeline."""
    return sum(module_bytes(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module))


def measure_calls(
    pipe: DiffusionPipeline, device: torch.device, prepare: Callable[[], object], together: int, calls: Sequence[tuple[int, Sequence[int]]], *,
    prepared: int = 0,
) -> tuple[dict[str, torch.nn.Module], list[Work]]:  # fmt: skip
    """The networks that a pipeline calls, and what its calls cost.

    Args:
        prepare: makes two calls of `together` pictures, one of the small U-Net alone and one of the large.
        calls: pictures of each schedule, and the calls of every U-Net for one of them.
        prepared: how often the run calls `prepare` too.
    """
    unet = stitched_unet(pipe)
    names = [LETTERS[0], *(f"{LETTERS[0]}{k}" for k in range(2, len(unet.unets))), LETTERS[1]]
    modules = dict(zip(names, unet.unets, strict=True)) | ({"ControlNet": pipe.controlnet} if getattr(pipe, "controlnet", None) else {})
    with flop_counter() as counter, Watch(modules, device, counter) as counted:
        prepare()
    with Watch(modules, device) as timed:
        began = time.perf_counter()
        prepare()
        rest = time.perf_counter() - began - sum(timed.seconds.values())
    times = {name: sum(count * each[k] for count, each in calls) for k, name in enumerate(names)}
    times |= {name: sum(times.values()) for name in modules if name not in times}
    works = [
        Work(
            name,
            times[name] + prepared * together * counted.calls[name],
            *(spent[name] / (together * max(1, counted.calls[name])) for spent in (counted.flops, timed.seconds)),
        )
        for name in modules
    ]
    other = counter.get_total_flops() - sum(counted.flops.values())
    pictures = sum(count for count, _ in calls) + prepared * 2 * together
    works.append(Work("text and decoding", pictures, other / (2 * together), rest / (2 * together)))
    return modules, works


def planned_legs(pipe: DiffusionPipeline, ratio: float, num_steps: int, strength: float | None = None) -> tuple[list[int], list[int]]:
    """Steps of the small and the large U-Net in a call that has not been made, and the calls of every U-Net."""
    unet, scheduler = stitched_unet(pipe), pipe.scheduler
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps if strength is None else pipe.get_timesteps(num_steps, strength, unet.device)[0]
    step_of_call = steps_of_calls(scheduler, len(timesteps))
    legs = read_ratio(ratio, len(unet.unets)).legs(step_of_call[-1] + 1)
    steps, owners = steps_by_denoiser(legs, len(unet.unets)), owners_of(legs)
    return [steps[0], steps[-1]], [sum(owners[step] == k for step in step_of_call) for k in range(len(unet.unets))]


def _save(pipe: DiffusionPipeline, plan: DemoPlan, rows: list[Row], columns: list[Pictures], shown: dict[str, Pictures], call: dict[str, Any]) -> None:
    _forget(plan.folder)
    for row, column in zip(rows, columns, strict=True):
        for name, picture in zip(row.files, column, strict=True):
            save_image(plan.folder / name, picture)
    side = min(CELL, max(columns[0][0].size))
    tiles = [[ImageOps.pad(picture, (side, side), color="white") for picture in row] for row in zip(*shown.values(), *columns, strict=True)]
    grid = torch.stack([torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in row]) for row in tiles])
    headers = [*shown, *(f"ratio {row.ratio:g}\n{row.seconds_per_image:.2f} s" for row in rows)]
    save_image(plan.folder / "grid.png", image_grid(grid, headers, [textwrap.shorten(prompt, 36, placeholder=" ...") for prompt in plan.prompts], cell=128))
    unet = stitched_unet(pipe)
    record = {
        "settings": {
            "pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__, "num_steps": plan.steps, **call,
            "size": list(columns[0][0].size),
        },
        "prompts": plan.prompts,
        "seeds": plan.seeds,
        "models": {"S": plan.small or str(unet.unets[0].config._name_or_path), "L": plan.large},
        "weights": {"S": weights_hash(unet.unets[0]), "L": weights_hash(unet.large)},
        **computed_by(unet.dtype, plan.loading["device"]),
    }  # fmt: skip
    write_json(plan.folder / "results.json", record | {"arguments": plan.arguments} | {"rows": [asdict(row) for row in rows]})


def _forget(folder: Path) -> None:
    """Remove the pictures of an earlier run, which its results.json names, and that record."""
    record = folder / "results.json"
    try:
        names = [name for row in read_json(record)["rows"] for name in row["files"]]
    except (InputError, LookupError, TypeError):  # none, or another tool's
        return
    for name in names:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    record.unlink()


def controlnet_parser(doc: str | None, *, prompt: str, controlnet: str, save_dir: str) -> argparse.ArgumentParser:
    """Make a parser for an SDXL demo whose pictures follow a map, which is drawn from --image."""
    parser = demo_parser(doc, prompt=prompt, negative_prompt="blur, low quality", large=LARGE_SDXL, save_dir=save_dir)
    add_picture_arg(parser, "pictures to follow, cut to the model's shape; they repeat")
    help_group(parser, MODELS).add_argument(
        "--controlnet", default=controlnet, metavar="NAME", help="ControlNet of the large model: a hub name, or a folder in diffusers format"
    )
    help_group(parser, SAMPLING).add_argument("--scale", type=float, default=0.5, help="how strictly the map is followed; 0 ignores it")
    return parser


def run_controlnet_demo(args: argparse.Namespace, plan: DemoPlan, what: str, draw: Callable[[Image.Image], Image.Image]) -> None:
    """Draw the map of each picture, and sample what follows it; `what` the map is goes over its column."""
    if not math.isfinite(args.scale):
        raise InputError(f"--scale must be a finite number, got {args.scale}")
    pipe = load_pipeline(get_tstitch_pipepline_sdxl_controlnet, plan, controlnet=args.controlnet)
    pictures = plan.fitted(pipe)
    maps = [draw(picture).convert("RGB").resize(picture.size) for picture in pictures]
    run_demo(pipe, plan, {"picture": pictures, what: maps}, {"image": maps}, controlnet_conditioning_scale=args.scale)
