r"""Train a small SDXL U-Net for the first part of the trajectory; the large U-Net, the text encoders and the VAE stay as they are.

    accelerate launch sd/train_sdxl_tstitch.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --small_model_name_or_path segmind/SSD-1B --train_data_dir pictures --ratio 0.4 --ratio_schedule curriculum --ratio_start 0.1 \
        --enable_distill --mixed_precision bf16 --gradient_checkpointing --output_dir runs/sdxl-small

The pictures and captions are listed in metadata.jsonl, one {"file_name": ..., "text": ...} a line. They are encoded once, before the first step, into
--cache_dir. A run that was killed goes on with --resume_from_checkpoint latest, to the same weights. output_dir gets config.json, log.jsonl,
timesteps-*.jsonl (what was drawn, by process), logs/ (TensorBoard), checkpoints/, validation/ and in the end unet_small/, which diffusers loads.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd.sdxl_data import EncodedPictures, UnencodedPictures, make_buckets, read_metadata, weights_hash
from sd.sdxl_training import Curriculum, Previews, StitchTraining, load_frozen, load_large, load_small, save_unet, training_scheduler
from tstitch.cli import DATA, LOGGING, MACHINE, OPTIMIZATION, add_dry_run_arg, help_group, new_parser, positive_int, run
from tstitch.dry_run import Files, checkpoint_files_of, module_bytes, plan_training, show_plan, training_bytes, training_memory
from tstitch.errors import InputError
from tstitch.files import check_folder
from tstitch.training import checkpoint_files, cosine_lr, fit
from tstitch.training_cli import create_accelerator

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the words are those of diffusers' trainers, with the words of our other trainers beside them."""
    parser = new_parser(__doc__)
    models = help_group(parser, "models (a folder in diffusers format or a hub name)")
    models.add_argument("--pretrained_model_name_or_path", required=True, help="the SDXL pipeline whose large U-Net takes the rest of the trajectory")
    models.add_argument("--small_model_name_or_path", required=True, help="the U-Net that is trained, or a pipeline that has it")
    models.add_argument("--variant", help="which files of the pretrained pipeline, fp16 for instance")
    data = help_group(parser, DATA)
    data.add_argument("--train_data_dir", type=Path, required=True, help="folder of pictures")
    data.add_argument("--metadata_file", type=Path, help="jsonl with file_name and text a line (default: metadata.jsonl in train_data_dir)")
    data.add_argument("--resolution", type=positive_int, default=1024, help="pictures are scaled and cropped to shapes of about its square")
    data.add_argument("--bucket_step", type=positive_int, default=64, help="pixels that divide the sides of every shape; RESOLUTION for squares only")
    data.add_argument("--cache_dir", type=Path, help="folder for encoded pictures and captions (default: OUTPUT_DIR/cache)")
    data.add_argument("--proportion_empty_prompts", type=float, default=0.1, help="share of captions left out, 0..1: what guidance needs")
    stitch = help_group(parser, "what is learned")
    stitch.add_argument("--ratio", type=float, default=0.4, help="share of the trajectory that the small model will own, above 0 and at most 1")
    stitch.add_argument("--ratio_schedule", choices=["fixed", "curriculum"], default="fixed", help="curriculum widens it from --ratio_start to --ratio")
    stitch.add_argument("--ratio_start", type=float, help="where a curriculum begins")
    stitch.add_argument("--ratio_steps", type=positive_int, help="steps over which a curriculum widens (default: all)")
    stitch.add_argument("--enable_distill", action="store_true", help="learn from the large U-Net's answers too")
    stitch.add_argument("--distill_weight", type=float, help="weight of that loss, at least 0 (default: 1)")
    stitch.add_argument("--snr_gamma", type=float, help="weigh the loss by min(SNR, gamma) / SNR (Hang et al. 2023, arXiv:2303.09556); off if not given")
    learning = help_group(parser, OPTIMIZATION)
    learning.add_argument("--max_train_steps", "--max-steps", type=positive_int, default=10_000, help="optimizer steps")
    learning.add_argument("--train_batch_size", type=positive_int, default=4, help="pictures at once in each process, all of one shape")
    learning.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="batches of each process before an optimizer step")
    learning.add_argument("--learning_rate", type=float, default=1e-5, help="peak learning rate, above 0")
    learning.add_argument("--lr_scheduler", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    learning.add_argument("--lr_warmup_steps", type=int, default=0, help="steps of linear warm-up")
    learning.add_argument("--adam_beta1", type=float, default=0.9, help="AdamW's decay of the first moment, 0..1")
    learning.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW's decay of the second moment, 0..1")
    learning.add_argument("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay, at least 0")
    learning.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, whose state takes a quarter of the memory")
    learning.add_argument("--max_grad_norm", type=float, default=1.0, help="largest gradient norm; 0 for no clipping")
    learning.add_argument("--ema_decay", type=float, default=0.9999, help="decay of the moving average that is shown and saved, 0 for none")
    learning.add_argument("--seed", type=int, default=0, help="seed of batches, timesteps and noise")
    speed = help_group(parser, MACHINE)
    speed.add_argument("--mixed_precision", choices=DTYPES, help="autocast type, and that of the large U-Net (default: what accelerate launch says, or no)")
    speed.add_argument("--gradient_checkpointing", action="store_true", help="compute activations twice to keep fewer of them")
    speed.add_argument("--allow_tf32", action="store_true", help="TensorFloat-32 for what stays float32 on a GPU")
    watch = help_group(parser, "validation")
    watch.add_argument("--validation_prompt", nargs="+", default=[], metavar="PROMPT", help="pictures of these, stitched at the current ratio")
    watch.add_argument("--validation_every", type=positive_int, default=500, metavar="STEPS", help="steps between them")
    watch.add_argument("--validation_num_inference_steps", type=positive_int, default=30, metavar="N", help="steps of each picture")
    watch.add_argument("--validation_guidance_scale", type=float, default=5.0, metavar="SCALE", help="1 turns guidance off")
    out = help_group(parser, LOGGING)
    out.add_argument("--output_dir", "--results-dir", type=Path, default=Path("runs/sdxl-small"), help="run folder")
    out.add_argument("--resume_from_checkpoint", "--load-ckpt", metavar="latest|PATH", help="go on from output_dir's newest checkpoint, or another run's")
    out.add_argument("--autoresume", dest="resume_from_checkpoint", action="store_const", const="latest", help="the same as --resume_from_checkpoint latest")
    out.add_argument("--checkpointing_steps", type=positive_int, default=500, help="steps between checkpoints")
    out.add_argument("--checkpoints_total_limit", type=positive_int, default=2, help="checkpoints to keep")
    out.add_argument("--log_every", type=positive_int, default=50, help="steps between lines of log.jsonl")
    out.add_argument("--report_to", choices=["tensorboard", "none"], default="tensorboard", help="where else the losses go")
    add_dry_run_arg(parser)
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> Curriculum:
    """Refuse values that would fail, train nonsense or decide nothing; give what --ratio and its kin say.

    Raises:
        InputError: naming the flags.
    """
    ranges = {
        "--learning_rate": args.learning_rate > 0,
        "--lr_warmup_steps": args.lr_warmup_steps >= 0,
        "--adam_beta1": 0 <= args.adam_beta1 < 1,
        "--adam_beta2": 0 <= args.adam_beta2 < 1,
        "--adam_weight_decay": args.adam_weight_decay >= 0,
        "--max_grad_norm": args.max_grad_norm >= 0,
        "--ema_decay": 0 <= args.ema_decay < 1,
        "--proportion_empty_prompts": 0 <= args.proportion_empty_prompts <= 1,
        "--snr_gamma": args.snr_gamma is None or args.snr_gamma > 0,
        "--distill_weight": args.distill_weight is None or args.distill_weight >= 0,
    }
    wrong = [flag for flag, right in ranges.items() if not right]
    if wrong:
        raise InputError(f"{', '.join(wrong)} out of range; --help gives the ranges")
    if args.distill_weight is not None and not args.enable_distill:
        raise InputError("--distill_weight decides nothing without --enable_distill; pass both or none")
    if args.ratio_schedule == "fixed" and (args.ratio_start is not None or args.ratio_steps is not None):
        raise InputError("--ratio_start and --ratio_steps decide nothing at a fixed ratio; pass --ratio_schedule curriculum or leave them out")
    if args.ratio_schedule == "curriculum" and args.ratio_start is None:
        raise InputError("a curriculum needs to know where it begins; pass --ratio_start, 0.1 for instance")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in DTYPES:
        raise InputError(f"--mixed_precision {precision} is not for this trainer; choose from {', '.join(DTYPES)}")
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("fp16 training needs a CUDA device; pass --mixed_precision bf16 or no")
    for package, needed, instead in (
        ("tensorboard", args.report_to == "tensorboard", "pass --report_to none: log.jsonl is always written"),
        ("bitsandbytes", args.use_8bit_adam, "leave --use_8bit_adam out"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            raise InputError(f"this needs the package {package}; pip install {package}, or {instead}")
    if args.validation_prompt and args.resolution % 8:
        raise InputError(f"pipelines make pictures whose sides 8 divides, not --resolution {args.resolution}; pass another or leave --validation_prompt out")
    for folder in (args.output_dir, args.cache_dir or args.output_dir):
        check_folder(folder)
    if args.ratio_schedule == "fixed":
        return Curriculum(args.ratio, args.ratio)
    return Curriculum(args.ratio, args.ratio_start, args.ratio_steps or args.max_train_steps)


def create_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW, torch's or with --use_8bit_adam that of bitsandbytes."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(model.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay)


def checkpoint_to_resume(args: argparse.Namespace) -> bool | Path:
    """What --resume_from_checkpoint means to `fit`: whether to go on from the newest checkpoint of output_dir, or another file.

    Raises:
        InputError: if there is no such checkpoint, or output_dir holds later ones.
    """
    wanted = args.resume_from_checkpoint
    if wanted in (None, "latest"):
        return wanted == "latest"
    path, own = Path(wanted), checkpoint_files(args.output_dir / "checkpoints")
    if not path.is_file():
        raise InputError(f"no checkpoint {path}; pass one of OUTPUT_DIR/checkpoints/*.pt, or latest")
    if own and own[-1].resolve() == path.resolve():
        return True
    if own:
        raise InputError(f"{own[-1]} is not {path}, and a run keeps one history; pass latest, remove that and later files, or choose another --output_dir")
    return path


def describe(
    args: argparse.Namespace, curriculum: Curriculum, data: EncodedPictures, small: torch.nn.Module, teacher: torch.nn.Module | None
) -> dict[str, Any]:
    """What decides what is learned; a run goes on only if it is the same."""
    names = (
        "resolution", "bucket_step", "proportion_empty_prompts", "enable_distill", "distill_weight", "snr_gamma", "train_batch_size", "learning_rate",
        "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "use_8bit_adam", "max_grad_norm", "ema_decay", "seed", "gradient_checkpointing",
        "allow_tf32",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names} | {
        "ratio": curriculum.ratio, "ratio_start": curriculum.start, "ratio_steps": curriculum.num_steps, "lr_schedule": args.lr_scheduler,
        "data": data.index, "teacher": teacher and weights_hash(teacher),
        "unet_config": {key: value for key, value in small.config.items() if not key.startswith("_")},
    }  # fmt: skip


def plan_run(
    args: argparse.Namespace, accelerator: Accelerator, data: UnencodedPictures, small: torch.nn.Module, losses: StitchTraining,
    take: Callable[[], object], start: int,
) -> None:  # fmt: skip
    """Answer --dry-run: what encoding the pictures leaves on disk, and what the steps from `start` on will cost."""

    def take_part(size: int) -> None:
        losses.size = size
        take()

    left, processes = args.max_train_steps - start, accelerator.num_processes
    moment = 1 if args.use_8bit_adam else 4
    works, how = plan_training(take_part, args.train_batch_size, times=left * losses.num_parts, device=accelerator.device, processes=processes)
    files = checkpoint_files_of(
        small, args.output_dir, steps=left, every=args.checkpointing_steps, keep=args.checkpoints_total_limit, moment=moment
    )  # fmt: skip
    files += [Files("unet_small", module_bytes(small), args.output_dir), Files("encoded pictures and captions", data.nbytes, data.cache)]
    if accelerator.is_main_process:
        show_plan(
            [
                ("model", f"{args.small_model_name_or_path}, {sum(p.numel() for p in small.parameters()) / 1e6:.4g} M parameters"),
                ("teacher", f"{args.pretrained_model_name_or_path}, {'asked at every step' if args.enable_distill else 'not asked'}"),
                ("data", f"{len(data)} pictures, of which {len(data.pictures_left)}, and {data.captions_left} captions, have to be encoded first"),
                ("training", f"{left} steps of {losses.num_parts} parts of {args.train_batch_size} pictures, ratio {args.ratio:g}, on {processes} processes"),
            ],
            works, how=how + ", without encoding, loading, previews and writing", files=files, ranks=processes,
            memory=training_memory(accelerator.device, training_bytes(small, moment)),
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Encode, train, save."""
    args = parse_args(argv)
    curriculum = check_arguments(args)
    resume = checkpoint_to_resume(args)
    buckets = make_buckets(args.resolution, args.bucket_step)
    pictures = read_metadata(args.metadata_file or args.train_data_dir / "metadata.jsonl", args.train_data_dir)
    accelerator = create_accelerator(args.mixed_precision, args.allow_tf32, args.report_to, args.output_dir / "logs")
    device = accelerator.device
    source = args.pretrained_model_name_or_path
    pipe = load_frozen(source, args.variant)
    if args.bucket_step % pipe.vae_scale_factor:
        raise InputError(f"--bucket_step {args.bucket_step} is not divisible by {pipe.vae_scale_factor}, the autoencoder's pixels per latent")
    small = load_small(args.small_model_name_or_path, source, pipe)
    large = load_large(source, DTYPES[accelerator.mixed_precision], args.variant) if args.enable_distill or args.validation_prompt else None

    data = (UnencodedPictures if args.dry_run else EncodedPictures)(pictures, pipe, args.cache_dir or args.output_dir / "cache", buckets)
    data.encode(pipe.to(device), args.validation_prompt, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    pipe.register_modules(unet=large and large.to(device), text_encoder=None, text_encoder_2=None)  # frees the memory of the encoders

    if args.gradient_checkpointing:
        small.enable_gradient_checkpointing()
    teacher = large if args.enable_distill else None
    num_parts = args.gradient_accumulation_steps * accelerator.num_processes
    losses = StitchTraining(
        data, curriculum, training_scheduler(pipe), size=args.train_batch_size, num_parts=num_parts, seed=args.seed, device=device,
        record=None if args.dry_run else args.output_dir / f"timesteps-{accelerator.process_index}.jsonl",
        large=teacher, distill_weight=1.0 if args.distill_weight is None else args.distill_weight,
        snr_gamma=args.snr_gamma, empty_prompts=args.proportion_empty_prompts,
    )  # fmt: skip
    previews = None
    if args.validation_prompt:
        previews = Previews(
            pipe, data.text(args.validation_prompt), data.text([None] * len(args.validation_prompt)), curriculum, args.output_dir / "validation", accelerator,
            size=args.resolution, num_steps=args.validation_num_inference_steps, guidance_scale=args.validation_guidance_scale, seed=args.seed,
        )  # fmt: skip
    if not args.dry_run:
        accelerator.init_trackers("train", config={name: str(value) for name, value in vars(args).items()})
    average = fit(
        small, losses, accelerator=accelerator, folder=args.output_dir, config=describe(args, curriculum, data, small, teacher),
        optimizer=create_optimizer(args, small), max_steps=args.max_train_steps, items_per_step=args.train_batch_size * num_parts,
        accumulation=args.gradient_accumulation_steps, ema_decay=args.ema_decay, clip_norm=args.max_grad_norm or None, seed=args.seed,
        lr_factor=lambda step: cosine_lr(step, args.max_train_steps, args.lr_warmup_steps, floor=1.0 if args.lr_scheduler == "constant" else 0.0),
        ckpt_every=args.checkpointing_steps, keep=args.checkpoints_total_limit, log_every=args.log_every, evaluate=previews,
        eval_every=args.validation_every, resume=resume,
        rehearse=partial(plan_run, args, accelerator, data, small, losses) if isinstance(data, UnencodedPictures) else None,
    )  # fmt: skip
    accelerator.end_training()
    if accelerator.is_main_process and not args.dry_run:
        unet = accelerator.unwrap_model(small)
        unet.load_state_dict(average)
        save_unet(args.output_dir / "unet_small", unet)
        print(f"small U-Net for ratio {args.ratio:g} after {args.max_train_steps} steps: {args.output_dir / 'unet_small'}")


if __name__ == "__main__":
    run(main)
