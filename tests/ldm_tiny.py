"""What tests of the U-Net backbone share: a tiny first stage in CompVis' words, and random weights."""

from __future__ import annotations

import torch
from torch import nn

DDCONFIG = {
    "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
VQ = {"ddconfig": DDCONFIG, "embed_dim": 3, "n_embed": 64}
KL = {"ddconfig": DDCONFIG | {"double_z": True}, "embed_dim": 4}


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter random values, for a variance of about one in each layer's answer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return model.eval()
