"""Tiny Stable Diffusion pipelines with random weights, built in memory: 32x32 pictures, latents 4x8x8, milliseconds a step.

They are diffusers' own pipelines in every other respect, so what holds for them holds for the real ones: shapes, calls, schedulers, offloading, saving.
The small and the large U-Net of a family differ in width only: `tiny_unet(1, width=8)` fits `tiny_sd()`, whose U-Net is 16 wide.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Module = TypeVar("Module", bound=torch.nn.Module)

TEXT_WIDTH = 32  # of each text encoder; the U-Nets of SDXL see two side by side
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
PICTURE_SIZES = [(40, 40), (33, 64), (70, 20), (32, 32), (40, 90), (31, 32)] * 2  # height, width
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's


def _seeded(seed: int, build: Callable[[], Module]) -> Module:
    """Build a module whose random weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def tiny_unet(seed: int = 0, *, width: int = 16, xl: bool = False, **config: object) -> UNet2DConditionModel:
    """A U-Net of 4x8x8 latents; `width` 8 makes a small one, 16 a large one, `xl` the conditions of SDXL; `config` overrides anything."""
    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
    }  # fmt: skip
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (width, 2 * width), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4, "cross_attention_dim": 2 * TEXT_WIDTH if xl else TEXT_WIDTH, **(added if xl else {}), **config,
    }  # fmt: skip
    return _seeded(seed, lambda: UNet2DConditionModel(**settings))


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An autoencoder of 4x8x8 latents and 32x32 pictures."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return _seeded(seed, lambda: AutoencoderKL(block_out_channels=(4, 4, 8), latent_channels=4, norm_num_groups=4, sample_size=32, **blocks))


def tiny_tokenizer() -> CLIPTokenizer:
    """A tokenizer that knows every byte and no word: other prompts have other tokens, cut after 75 characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]  # byte-level BPE's names of the 256 bytes
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[], model_max_length=77)


def tiny_text_encoder(seed: int = 0, *, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder for `tiny_tokenizer`; with `projection` the second one of SDXL."""
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=TEXT_WIDTH,
        bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return _seeded(seed, lambda: (CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def tiny_controlnet(seed: int = 0, *, xl: bool = False, zero: bool = False) -> ControlNetModel:
    """A ControlNet of the large tiny U-Net; `zero` keeps its last convolutions at zero, as before training, so that it says nothing."""

    def build() -> ControlNetModel:
        net = ControlNetModel.from_unet(tiny_unet(xl=xl), conditioning_embedding_out_channels=(4, 8, 8))
        for name, weight in net.named_parameters():
            if not zero and name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                torch.nn.init.normal_(weight, std=0.3)
        return net

    return _seeded(seed, build)


def tiny_sd(seed: int = 0, pipeline: type[DiffusionPipeline] = StableDiffusionPipeline, **components: object) -> DiffusionPipeline:
    """A Stable Diffusion pipeline with a U-Net 16 wide; another class (img2img, inpainting) or other components on request. Draws no progress bar."""
    parts = {
        "vae": tiny_vae(seed), "text_encoder": tiny_text_encoder(seed), "tokenizer": tiny_tokenizer(), "unet": tiny_unet(seed),
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1), "safety_checker": None, "feature_extractor": None,
        "requires_safety_checker": False,
    }  # fmt: skip
    return _quiet(pipeline(**(parts | components)))


def tiny_sdxl(seed: int = 0, pipeline: type[DiffusionPipeline] = StableDiffusionXLPipeline, **components: object) -> DiffusionPipeline:
    """An SDXL pipeline with a U-Net 16 wide; another class (img2img, inpainting) or other components on request. Draws no progress bar."""
    parts = {
        "vae": tiny_vae(seed), "text_encoder": tiny_text_encoder(seed), "text_encoder_2": tiny_text_encoder(seed + 1, projection=True),
        "tokenizer": tiny_tokenizer(), "tokenizer_2": tiny_tokenizer(), "unet": tiny_unet(seed, xl=True),
        "scheduler": EulerDiscreteScheduler(**BETAS, steps_offset=1), "add_watermarker": False,
    }  # fmt: skip
    return _quiet(pipeline(**(parts | components)))


def tiny_sd_controlnet(seed: int = 0) -> DiffusionPipeline:
    """Stable Diffusion with a ControlNet."""
    return tiny_sd(seed, StableDiffusionControlNetPipeline, controlnet=tiny_controlnet(seed))


def tiny_sdxl_controlnet(seed: int = 0) -> DiffusionPipeline:
    """SDXL with a ControlNet."""
    return tiny_sdxl(seed, StableDiffusionXLControlNetPipeline, controlnet=tiny_controlnet(seed, xl=True))


def tiny_lcm(seed: int = 0) -> DiffusionPipeline:
    """A latent consistency model, whose U-Net embeds the guidance scale (`time_cond_proj_dim` 16); its small U-Net must do so too."""
    return tiny_sd(seed, LatentConsistencyModelPipeline, unet=tiny_unet(seed, time_cond_proj_dim=16), scheduler=LCMScheduler(**BETAS))


def _quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_pair(folder: Path, *, xl: bool = False) -> tuple[Path, Path]:
    """Write a tiny pipeline and a small U-Net of its own as a user would have them; gives the folders (large, small), both in diffusers format."""
    large, small = folder / "large", folder / "small"
    (tiny_sdxl if xl else tiny_sd)().save_pretrained(large)
    tiny_unet(1, width=8, xl=xl).save_pretrained(small / "unet")
    return large, small


def draw(pipe: DiffusionPipeline, prompt: str | list[str] = "a red dog", steps: int = 6, seed: int = 0, **kwargs: object) -> torch.Tensor:
    """Latents of one call, from a fresh generator."""
    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="latent", **kwargs).images


def small_sd(**config: object) -> UNet2DConditionModel:
    """The small U-Net of `tiny_sd`."""
    return tiny_unet(1, width=8, **config)


def small_xl(**config: object) -> UNet2DConditionModel:
    """The small U-Net of `tiny_sdxl`."""
    return tiny_unet(1, width=8, xl=True, **config)


def load(get: Callable, *args: object, **kwargs: object) -> DiffusionPipeline:
    """A pipeline by one of the published loaders, on the CPU, without a progress bar."""
    pipe = get(*args, device="cpu", **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_lines(folder: Path, lines: list[str]) -> Path:
    """A metadata file of these lines."""
    file = folder / "metadata.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return file


def write_pictures(folder: Path) -> Path:
    """Twelve plain pictures of several shapes, and their captions."""
    colours = np.random.default_rng(0).integers(0, 255, (len(PICTURE_SIZES), 3), dtype=np.uint8)
    for k, size in enumerate(PICTURE_SIZES):
        Image.fromarray(np.broadcast_to(colours[k], (*size, 3)).copy()).save(folder / f"{k}.png")
    write_lines(folder, [json.dumps({"file_name": f"{k}.png", "text": f"colour {k % 5}"}) for k in range(len(PICTURE_SIZES))])
    return folder
