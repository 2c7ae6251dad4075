"""One rule of names: how CompVis calls a tensor of diffusers' U-Net or autoencoder.

Both sides have the same tensors, so a state dict is converted by renaming, in either direction; nothing is computed. Only the attention of autoencoders
differs in shape: CompVis keeps its matrices (C, C) as 1x1 convolutions (C, C, 1, 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AUTOENCODER_PARTS = [
    (r"\bconv_norm_out\b", "norm_out"),
    (r"\bmid_block\.attentions\.0\b", "mid.attn_1"),
    (r"\bdown_blocks\b", "down"),
    (r"\bresnets\b", "block"),
    (r"\battentions\b", "attn"),
    (r"\b(down|up)samplers\.0\b", r"\1sample"),
    (r"\bconv_shortcut\b", "nin_shortcut"),
    (r"\bgroup_norm\b", "norm"),
    (r"\bto_([qkv])\b", r"\1"),
    (r"\bto_out\.0\b", "proj_out"),
]


def compvis_names(model: nn.Module) -> dict[str, str]:
    """{diffusers name: CompVis name} of all tensors of a UNet2DConditionModel, VQModel or AutoencoderKL."""
    own = model.state_dict()
    if "time_embedding.linear_1.weight" in own:
        return {name: _unet_name(name, model.config.layers_per_block + 1, own) for name in own}
    return {name: _autoencoder_name(name, len(model.config.block_out_channels)) for name in own}


def _unet_name(name: str, blocks: int, own: Mapping[str, Tensor]) -> str:
    """CompVis numbers blocks through all levels; a level has `blocks` of them, its resampling counted on the way down and added to the last on the way up."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind in ("downsamplers", "upsamplers"):
            layer = blocks - 1
        number = level * blocks + layer
        block = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"  # input block 0 is the first convolution
        if kind == "resnets":
            return f"{block}.0.{_swapped(rest, _UNET_RESNET)}"
        if kind == "attentions":
            return f"{block}.1.{rest}"
        if kind == "downsamplers":
            return f"{block}.0.{rest.replace('conv', 'op')}"
        return f"{block}.{1 + (f'up_blocks.{level}.attentions.0.norm.weight' in own)}.{rest}"
    if match := re.match(r"mid_block\.resnets\.(\d)\.(.+)", name):
        return f"middle_block.{2 * int(match[1])}.{_swapped(match[2], _UNET_RESNET)}"
    if match := re.match(r"mid_block\.attentions\.0\.(.+)", name):
        return f"middle_block.1.{match[1]}"
    return _swapped(name, _UNET_ENDS)


def _swapped(name: str, table: Mapping[str, str]) -> str:
    module, parameter = name.rsplit(".", 1)
    return f"{table[module]}.{parameter}"


def _autoencoder_name(name: str, levels: int) -> str:
    name = re.sub(r"\bmid_block\.resnets\.(\d)\b", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"\bup_blocks\.(\d+)\b", lambda match: f"up.{levels - 1 - int(match[1])}", name)  # CompVis counts from the finest level
    for pattern, replacement in _AUTOENCODER_PARTS:
        name = re.sub(pattern, replacement, name)
    return name


def compvis_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape that CompVis gives the tensor of this CompVis name, from diffusers' shape."""
    return (*shape, 1, 1) if len(shape) == 2 and re.search(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.", name) else tuple(shape)
