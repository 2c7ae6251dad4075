"""A U-Net with what it is conditioned on, behind the one interface of a denoiser: called as (x, t, y), it returns eps.

The class embedder belongs to the denoiser, so two U-Nets whose contexts differ in width are stitched like any others. Label `num_classes` means "no
label": its context is the embedder's extra row where there is one, else `unconditional`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tstitch.errors import InputError


class LatentDenoiser(nn.Module):
    """A class-conditional U-Net.

    Args:
        unet: diffusers' UNet2DConditionModel.
        embedder: table of num_classes rows, or one more for the learned null label; as wide as the U-Net's context.
        num_classes: classes without the null label.

    Raises:
        InputError: if the table has another number of rows.
    """

    def __init__(self, unet: nn.Module, embedder: nn.Embedding, num_classes: int) -> None:
        super().__init__()
        rows = embedder.num_embeddings
        if rows not in (num_classes, num_classes + 1):
            raise InputError(f"the class embedder has {rows} rows, which is not {num_classes} classes with or without a null label; pass another num_classes")
        self.unet, self.embedder, self.num_classes = unet, embedder, num_classes
        self.unconditional: Tensor | None = None
        """Contexts of the null label (N, 1, D): row i belongs to sample i of batches of N. It overrides a learned null label."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of x."""
        return (self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)

    @property
    def context_dim(self) -> int:
        """Width D of the context."""
        return self.embedder.embedding_dim

    @property
    def has_null_label(self) -> bool:
        """Whether a null label was learned."""
        return self.embedder.num_embeddings > self.num_classes

    def context(self, y: Tensor) -> Tensor:
        """Contexts (N, 1, D) of labels (N,).

        Raises:
            ValueError: if `unconditional` is of a batch that this one is no multiple of.
        """
        if self.unconditional is None:
            return self.embedder(y).unsqueeze(1)
        batch = len(self.unconditional)
        if len(y) % batch:
            raise ValueError(f"the unconditional contexts are of {batch} samples, which {len(y)} labels are no multiple of")
        # Guidance and sweeps stack whole batches, so the order of the samples repeats.
        unconditional = self.unconditional.to(y.device, self.embedder.weight.dtype).repeat(len(y) // batch, 1, 1)
        known = self.embedder(y.clamp(max=self.num_classes - 1)).unsqueeze(1)
        return torch.where((y == self.num_classes).view(-1, 1, 1), unconditional, known)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict eps (N, C, H, W), in x's number type, from x, training timesteps t (N,) in 0..999 and labels y (N,) in 0..num_classes."""
        context = self.context(y)
        return self.unet(x.to(context.dtype), t, encoder_hidden_states=context).sample.to(x.dtype)
