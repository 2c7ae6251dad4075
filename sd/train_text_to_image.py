"""Train the U-Nets of the emoji text-to-image pair: first the large one with the text encoder, then the small one on the encoder that stays as it is.

    python sd/train_text_to_image.py --features-path data/emoji/features --model emoji-large --pipeline pretrained_models/emoji/sd --autoresume
    python sd/train_text_to_image.py --features-path data/emoji/features --model emoji-small --pipeline pretrained_models/emoji/sd --autoresume
        --text-encoder pretrained_models/emoji/sd --results-dir runs/sd-small

Both read the same text embedding, so one can hand over to the other. A run that was killed goes on with --autoresume, to the same weights. results-dir gets
config.json, log.jsonl, checkpoints/ and, with --preview-every, previews/. --pipeline writes the moving average as a folder in diffusers format, all but the
autoencoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd.emoji_text import (
    build_text_encoder,
    build_tokenizer,
    draw_texts,
    emoji_numbers,
    load_text,
    read_captions,
    save_text,
    token_ids,
    tokenizer_hash,
    vocabulary_texts,
    write_component,
)
from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import file_hash, save_weights
from tstitch.cli import DATA, LOGGING, MODEL, OPTIMIZATION, help_group, new_parser, run
from tstitch.data import check_vae, class_weights
from tstitch.errors import InputError
from tstitch.files import check_folder, write_json
from tstitch.plots import contact_sheet, save_image
from tstitch.torchvision_compat import prepare_torchvision
from tstitch.training import draw_batch, snr_weights
from tstitch.training_cli import TrainingPlan, add_training_args, training_plan

prepare_torchvision()
import diffusers
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

# Model -> channels at 16x16, 8x8 and 4x4, and the folder that a pipeline has for it.
UNETS = {"emoji-large": ((48, 48, 64), "unet"), "emoji-small": ((16, 32, 32), "unet_small")}
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
PREVIEW_PROMPTS = (
    "red heart", "dog face, twitter style", "waving hand, medium skin tone, google style", "pizza", "flag japan", "food & drink", "crying face", "blue car",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    model = help_group(parser, MODEL)
    model.add_argument("--model", choices=UNETS, default="emoji-large", help="U-Net to train")
    model.add_argument("--text-encoder", type=Path, metavar="FOLDER", help="pipeline whose tokenizer and text encoder to keep, not to train anew")
    data = help_group(parser, DATA)
    data.add_argument("--captions", type=Path, metavar="FILE", help="from assets/emoji/write_captions.py (default: captions.jsonl of the features)")
    data.add_argument("--text-dropout", type=float, default=0.1, help="share of captions replaced by the empty text, 0..1")
    help_group(parser, OPTIMIZATION).add_argument(
        "--snr-gamma", type=float, default=5.0, help="weigh the loss by min(SNR, gamma) / SNR (Hang et al. 2023, arXiv:2303.09556)"
    )
    add_training_args(parser, results_dir="runs/sd-large")
    out = help_group(parser, LOGGING)
    out.add_argument("--pipeline", type=Path, metavar="FOLDER", help="write the moving average there at the end, fp16, in diffusers format")
    out.add_argument("--preview-every", type=int, default=0, metavar="STEPS", help="steps between pictures of the average, decoded with --vae; 0: none")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that would fail, or train nonsense, later."""
    if args.features_path is None or args.data_path:
        raise InputError("captions belong to extracted features; pass their folder with --features-path, and no --data-path")
    if not 0 <= args.text_dropout < 1:
        raise InputError(f"--text-dropout must lie in [0, 1), got {args.text_dropout}")
    if not args.snr_gamma > 0:
        raise InputError(f"--snr-gamma must be above 0, got {args.snr_gamma}")
    if args.preview_every < 0:
        raise InputError(f"--preview-every must not be negative, got {args.preview_every}")
    if args.pipeline:
        check_folder(args.pipeline)
        check_pair(args.pipeline, UNETS[args.model][1], args.text_encoder)


def check_pair(folder: Path, unet_folder: str, text_encoder: Path | None) -> None:
    """Refuse a pipeline folder whose other U-Net reads another text encoder than the one that will be written there.

    Raises:
        InputError: naming the other U-Net.
    """
    other = next(name for _, name in UNETS.values() if name != unet_folder)
    there, used = ((place or folder) / "text_encoder" / "model.safetensors" for place in (folder, text_encoder))
    kept = text_encoder is not None and there.exists() and used.exists() and file_hash(there) == file_hash(used)
    if (folder / other).exists() and not kept:
        raise InputError(f"{folder} holds {other}, whose text encoder would be replaced by another; remove the folder, or choose another --pipeline")


def build_unet(channels: tuple[int, ...], latent_shape: tuple[int, ...], text_width: int) -> UNet2DConditionModel:
    """One block a level; the text reaches the lowest by cross-attention, and every block, pooled, together with the timestep: at 16x16 that is all but free.

    Norms go over groups of four channels and more: a channel that is a group of its own would lose its mean, and with it the colours of a picture.
    """
    return UNet2DConditionModel(
        sample_size=latent_shape[-1], in_channels=latent_shape[0], out_channels=latent_shape[0], block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels), cross_attention_dim=text_width,
        attention_head_dim=4, norm_num_groups=channels[0] // 4 if channels[0] < 32 else 8, addition_embed_type="text", addition_embed_type_num_heads=4,
    )  # fmt: skip


class TextToImage(nn.Module):
    """A U-Net behind its text encoder: (x_t (N, C, h, w), t (N,), tokens (N, length)) -> predicted noise, like x_t.

    Args:
        frozen: the encoder stays as it is; its weights are then no part of this module, neither trained nor averaged nor stored with it.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, frozen: bool) -> None:
        super().__init__()
        self.unet = unet
        self._text_encoder = (text_encoder.requires_grad_(not frozen),)  # a tuple hides it from torch
        if not frozen:
            self.text_encoder = text_encoder

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x_t, t, self._text_encoder[0](tokens).last_hidden_state).sample

    def pipeline(self, tokenizer: CLIPTokenizer, vae: nn.Module | None) -> StableDiffusionPipeline:
        """The same models as a Stable Diffusion pipeline."""
        scheduler = DDIMScheduler(**NOISE, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing")
        return StableDiffusionPipeline(vae, self._text_encoder[0], tokenizer, self.unet, scheduler, None, None, requires_safety_checker=False)


def export_pipeline(folder: Path, pipeline: StableDiffusionPipeline, unet_folder: str) -> None:
    """Write all but the autoencoder in fp16, diffusers format; a folder that has another U-Net keeps it. Each file appears whole, model_index.json last."""
    write_component(pipeline.unet.half(), folder / unet_folder)
    save_text(folder, pipeline.tokenizer, pipeline.text_encoder)
    write_component(pipeline.scheduler, folder / "scheduler")
    missing = {"vae", "_name_or_path"} | ({"unet"} if not (folder / "unet").exists() else set())
    index = {key: value for key, value in pipeline.config.items() if key not in missing}
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__, **index})


def draw_previews(model: TextToImage, step: int, *, folder: Path | None, tokenizer: CLIPTokenizer, autoencoder: Autoencoder) -> dict[str, float]:
    """Write folder/{step:07d}.png: PREVIEW_PROMPTS, each from its own seed; without a folder, as on all processes but the first, nothing."""
    pipeline = model.pipeline(tokenizer, autoencoder.vae)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PREVIEW_PROMPTS))]
    latents = pipeline(list(PREVIEW_PROMPTS), num_inference_steps=20, guidance_scale=4.0, generator=generators, output_type="latent").images
    if folder is not None:
        save_image(folder / f"{step:07d}.png", contact_sheet(autoencoder.decode(latents), f"step {step}"))
    return {}


def main(argv: list[str] | None = None) -> None:
    """Build, train, export."""
    args = parse_args(argv)
    check_arguments(args)
    plan = training_plan(args)
    captions_file = args.captions or args.features_path / "captions.jsonl"
    captions = read_captions(captions_file, len(plan.data))
    channels, unet_folder = UNETS[args.model]

    def build() -> tuple[TextToImage, CLIPTokenizer]:
        torch.manual_seed(args.global_seed)
        if args.text_encoder:
            tokenizer, text_encoder = load_text(args.text_encoder)
        else:
            tokenizer = build_tokenizer(vocabulary_texts(captions))
            text_encoder = build_text_encoder(tokenizer)
        unet = build_unet(channels, plan.data.latent_shape, text_encoder.config.hidden_size)
        return TextToImage(unet, text_encoder.to(plan.accelerator.device), frozen=bool(args.text_encoder)), tokenizer

    model, tokenizer = build()
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(**NOISE)
    weights = snr_weights(scheduler.alphas_cumprod.double().numpy(), args.snr_gamma)
    balance = class_weights(emoji_numbers(captions), args.class_balance) if args.class_balance else None

    def losses(model: nn.Module, step: int, part: int) -> dict[str, Tensor]:
        index = draw_batch(balance, len(captions), step=step, part=part, num_parts=plan.num_parts, size=plan.part_size, seed=args.global_seed)
        x_0 = plan.data.latents(index)
        tokens = token_ids(tokenizer, draw_texts([captions[k] for k in index.tolist()], args.text_dropout))
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(index),))
        eps = torch.randn(x_0.shape)
        device = plan.accelerator.device
        predicted = model(scheduler.add_noise(x_0, eps, t).to(device), t.to(device), tokens.to(device)).float()
        mse = (predicted - eps.to(device)).square().mean(dim=(1, 2, 3))
        return {"loss": (weights[t].to(device) * mse).mean(), "mse": mse.mean()}

    text_hash = file_hash(args.text_encoder / "text_encoder" / "model.safetensors") if args.text_encoder else None
    config = {
        "model_config": {"model": args.model, "channels": list(channels)}, "snr_gamma": args.snr_gamma, "text_dropout": args.text_dropout,
        "captions": file_hash(captions_file), "text_encoder": text_hash, "tokenizer": tokenizer_hash(tokenizer),
    }  # fmt: skip
    average = plan.fit(model, losses, config, evaluate=preview(args, plan, tokenizer), eval_every=args.preview_every)
    if plan.accelerator.is_main_process and not args.dry_run:
        print(f"{args.model} after {plan.max_steps} steps of {args.global_batch_size}: {args.results_dir}")
        if args.export:
            save_weights(args.export, average, config["model_config"])
            print(f"moving average -> {args.export}")
        if args.pipeline:
            shipped, tokenizer = build()
            shipped.load_state_dict(average)
            export_pipeline(args.pipeline, shipped.cpu().pipeline(tokenizer, None), unet_folder)
            print(f"moving average in diffusers format -> {args.pipeline}")


def preview(args: argparse.Namespace, plan: TrainingPlan, tokenizer: CLIPTokenizer) -> Callable[[nn.Module, int], dict[str, float]] | None:
    """What --preview-every asks for; None where it is 0."""
    if not args.preview_every:
        return None
    autoencoder = Autoencoder(args.vae, plan.accelerator.device)
    check_vae(plan.data, autoencoder.source)
    folder = args.results_dir / "previews" if plan.accelerator.is_main_process else None
    return partial(draw_previews, folder=folder, tokenizer=tokenizer, autoencoder=autoencoder)


if __name__ == "__main__":
    run(main)
