"""Latents <-> pictures, through a diffusers AutoencoderKL."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tstitch.checkpoints import first_line
from tstitch.errors import InputError


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> uint8: 127.5 x + 128, clamped, cut off. Published sample files were rounded this way."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


class Autoencoder:
    """A frozen VAE with its scaling factor.

    Args:
        source: folder in diffusers format, or a hub name.

    Raises:
        InputError: if the source is no such folder and cannot be fetched.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from diffusers import AutoencoderKL  # seconds to import, so only where pictures are made

        local = Path(source)
        if not local.is_dir() and (local.is_absolute() or local.parts[:1] == ("pretrained_models",)):
            raise InputError(f"no autoencoder at {source}; restore that folder or pass another with --vae")
        try:
            self.vae: nn.Module = AutoencoderKL.from_pretrained(source, torch_dtype=dtype).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise InputError(f"could not load the autoencoder {source} ({first_line(error)}); pass its folder with --vae, or connect to the hub") from None
        self.scaling_factor: float = self.vae.config.scaling_factor
        self.downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels per latent in each direction
        self.latent_channels: int = self.vae.config.latent_channels
        self.weights = local / "diffusion_pytorch_model.safetensors"
        self.device, self.dtype = torch.device(device), dtype

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of one square picture."""
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
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Scaled latents (N, C, h, w) -> uint8 pictures (N, 3, H, W) on the CPU, `batch` at a time to bound memory."""
        scaled = latents.to(self.device, self.dtype) / self.scaling_factor
        return torch.cat([to_uint8(self.vae.decode(part).sample).cpu() for part in scaled.split(batch)])
