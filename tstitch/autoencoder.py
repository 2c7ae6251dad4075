"""Latents <-> pictures, through diffusers' AutoencoderKL or VQModel, or through nothing for models of pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tstitch.errors import InputError
from tstitch.torchvision_compat import prepare_torchvision

# The two Stable Diffusion autoencoders that published DiT weights belong to.
NAMED_VAES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
PIXELS = "none"  # the name that stands for no autoencoder
NO_VARIANCE = -1e4  # a log variance that float16 holds, and whose standard deviation is 0 in float32


@dataclass(frozen=True)
class AutoencoderFile:
    """An autoencoder in another format than diffusers': its weights file, which names it, and what makes an AutoencoderKL or VQModel of it."""

    path: Path
    load: Callable[[], nn.Module]

    def __str__(self) -> str:
        return str(self.path)


Source = str | Path | AutoencoderFile


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> uint8: 127.5 x + 128, clamped, cut off. Published sample files were rounded this way."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


class _Identity(nn.Module):
    """Takes the place of an AutoencoderKL for models of pixels: latents are pictures, without any variance.

    The scaling factor puts level k of 0..255 at (k + 1/2) / 128 - 1, the middle of the cell that decodes to k: [k, k + 1) / 128 - 1.
    """

    config = SimpleNamespace(scaling_factor=255 / 256, block_out_channels=(3,), latent_channels=3)

    def encode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=x)

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=z)


def _load(source: str | AutoencoderFile, dtype: torch.dtype) -> Any:  # noqa: ANN401  (AutoencoderKL, VQModel and _Identity share no type)
    if source == PIXELS:
        return _Identity()
    if isinstance(source, AutoencoderFile):
        return nn.Module.to(source.load(), dtype)  # diffusers' own to() warns of modules that stay float32, of which these networks have none
    prepare_torchvision()  # diffusers imports it where it is installed
    from diffusers import AutoencoderKL  # seconds to import, so only where pictures are made

    from tstitch.hub import from_hub

    local = Path(source)
    if not local.is_dir() and (local.is_absolute() or local.parts[:1] == ("pretrained_models",)):
        raise InputError(f"no autoencoder at {source}; restore that folder or pass another with --vae")
    with from_hub(source, "the autoencoder", "its folder with --vae"):
        return AutoencoderKL.from_pretrained(source, torch_dtype=dtype)


class Autoencoder:
    """A frozen autoencoder with its scaling factor. The latents of a VQModel are its map before quantisation, without variance; decoding quantises.

    Args:
        source: mse, ema, a folder in diffusers format, a hub name, an `AutoencoderFile`, or none: the latents are then the pictures (3, H, W) in [-1, 1],
            in float32.

    Raises:
        InputError: if the source is no such folder and cannot be fetched.
    """

    def __init__(self, source: Source, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.source = NAMED_VAES.get(str(source), str(source))
        if self.source == PIXELS:
            dtype = torch.float32  # half precision would blur the 256 levels
        self.vae = _load(source if isinstance(source, AutoencoderFile) else self.source, dtype).to(device).eval().requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)  # what convolutions read fastest, on CPUs and GPUs
        self.scaling_factor: float = self.vae.config.scaling_factor
        self.downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels per latent in each direction
        # A VQModel's codes may have another width than its encoder's output.
        self.latent_channels: int = getattr(self.vae.config, "vq_embed_dim", None) or self.vae.config.latent_channels
        self.weights = weights_file(source if isinstance(source, AutoencoderFile) else self.source)
        self.device, self.dtype = torch.device(device), dtype

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of one square picture.

        Raises:
            InputError: if image_size is no multiple of the pixels per latent.
        """
        if image_size % self.downsampling:
            raise InputError(f"--image-size {image_size} is not divisible by {self.downsampling}, the autoencoder's pixels per latent; choose a multiple")
        return (self.latent_channels, image_size // self.downsampling, image_size // self.downsampling)

    def check_fit(self, latent_shape: tuple[int, ...], image_size: int) -> None:
        """Refuse latents (C, h, w) that do not decode to pictures of image_size.

        Raises:
            InputError: naming what differs.
        """
        channels, height, _ = latent_shape
        if channels != self.latent_channels:
            raise InputError(f"the autoencoder has {self.latent_channels} latent channels, the denoisers {channels}; pass their own with --vae")
        if height * self.downsampling != image_size:
            size = height * self.downsampling
            raise InputError(f"the autoencoder makes {size}x{size} pictures of these latents, not {image_size}x{image_size}; pass another with --vae")

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 16) -> Tensor:
        """uint8 pictures (N, 3, H, W) -> the posterior's moments (N, 2C, h, w), mean and log variance, unscaled, float32, on the CPU; `batch` at a time."""
        moments = []
        for part in images.split(batch):
            encoded = self.vae.encode((part.to(self.device).float() / 127.5 - 1).to(self.dtype))
            if hasattr(encoded, "latents"):
                mean, log_variance = encoded.latents, torch.full_like(encoded.latents, NO_VARIANCE)
            else:
                mean, log_variance = encoded.latent_dist.mean, encoded.latent_dist.logvar
            moments.append(torch.cat([mean, log_variance], dim=1).float().cpu())
        return torch.cat(moments)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Scaled latents (N, C, h, w) -> uint8 pictures (N, 3, H, W) on the CPU, `batch` at a time to bound memory.

        Raises:
            InputError: if latents or pictures are not finite, which uint8 would show as black.
        """
        scaled = latents.to(self.device, self.dtype) / self.scaling_factor
        pictures, finite = [], []
        for part in scaled.split(batch):
            decoded = self.vae.decode(part).sample
            finite.append(part.isfinite().all() & decoded.isfinite().all())  # of the latents too: a VQModel quantises NaN to pictures
            pictures.append(to_uint8(decoded).cpu())
        if not torch.stack(finite).all():  # read after the copies, which have waited for the device already
            raise InputError("the samples are not finite (NaN or infinity); try --dtype fp32 or bf16, or check the weights")
        return torch.cat(pictures)


def weights_file(source: Source) -> Path:
    """The file whose hash tells which autoencoder it is: itself, in the folder, or in the hub's cache; for none an empty one."""
    if isinstance(source, AutoencoderFile):
        return source.path
    if str(source) == PIXELS:
        return Path(os.devnull)
    names = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    if Path(source).is_dir():
        files = [Path(source) / name for name in names]
    else:
        from huggingface_hub import try_to_load_from_cache

        files = [Path(found) for name in names if isinstance(found := try_to_load_from_cache(str(source), name), str)]
    return next((file for file in files if file.exists()), Path(source) / names[0])
