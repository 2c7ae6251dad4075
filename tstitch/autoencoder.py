"""Latents <-> pictures, through a diffusers AutoencoderKL."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tstitch.errors import InputError


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> uint8: 127.5 x + 128, clamped, cut off. Published sample files were rounded this way."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


class Autoencoder:
    """A frozen VAE with its scaling factor.

    Args:
        source: folder in diffusers format, or a hub name.
        downsampling: pixels per latent in each direction.

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
            reason = str(error).splitlines()[0][:160]
            raise InputError(f"could not load the autoencoder {source} ({reason}); put it in pretrained_models/ or connect to the hub once") from None
        self.scaling_factor: float = self.vae.config.scaling_factor
        self.downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.device, self.dtype = torch.device(device), dtype

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Scaled latents (N, C, h, w) -> uint8 pictures (N, 3, H, W) on the CPU, `batch` at a time to bound memory."""
        scaled = latents.to(self.device, self.dtype) / self.scaling_factor
        return torch.cat([to_uint8(self.vae.decode(part).sample).cpu() for part in scaled.split(batch)])
