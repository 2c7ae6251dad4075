"""CompVis' options as diffusers' networks: the `params` of a yaml's UNetModel, VQModelInterface or AutoencoderKL make an untrained network.

The networks are diffusers' own. What those cannot express is refused by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tstitch.errors import InputError
from tstitch.torchvision_compat import prepare_torchvision

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel

_NEEDED = object()

# Options of CompVis' UNetModel with their defaults, those of its Encoder and Decoder ("ddconfig"), and those of its first stages.
_UNET_OPTIONS: dict[str, Any] = {
    "image_size": None, "in_channels": _NEEDED, "model_channels": _NEEDED, "out_channels": _NEEDED, "num_res_blocks": _NEEDED,
    "attention_resolutions": _NEEDED, "dropout": 0.0, "channel_mult": (1, 2, 4, 8), "num_classes": None, "num_heads": -1, "num_head_channels": -1,
    "use_scale_shift_norm": False, "use_spatial_transformer": _NEEDED, "transformer_depth": 1, "context_dim": _NEEDED,
    "norm_num_groups": 32,  # ours: CompVis has no other; 32 groups of 32 channels would take every channel's mean away
}  # fmt: skip
_DDCONFIG_OPTIONS: dict[str, Any] = {
    "double_z": True, "z_channels": _NEEDED, "resolution": _NEEDED, "in_channels": _NEEDED, "out_ch": _NEEDED, "ch": _NEEDED, "ch_mult": (1, 2, 4, 8),
    "num_res_blocks": _NEEDED, "attn_resolutions": _NEEDED, "attn_type": "vanilla",
}  # fmt: skip
_FIRST_STAGE_OPTIONS: dict[str, Any] = {"ddconfig": _NEEDED, "embed_dim": _NEEDED, "n_embed": None}
# Options that diffusers' networks have in one form only; without the spatial transformer CompVis has attention without a context.
_UNET_FIXED = {"dims": 2, "conv_resample": True, "resblock_updown": False, "use_spatial_transformer": True, "n_embed": None}
_DDCONFIG_FIXED = {"dropout": 0.0, "resamp_with_conv": True, "tanh_out": False, "give_pre_end": False, "use_linear_attn": False}
_FIRST_STAGE_FIXED = {"remap": None, "sane_index_shape": False}
# Options that do not change what these networks compute: of speed, of training, or of attention without a context, which they do not have.
_UNET_FREE = {"use_checkpoint", "use_fp16", "legacy", "use_new_attention_order", "num_heads_upsample"}
_FIRST_STAGE_FREE = {
    "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema",
}  # fmt: skip


def build_ldm_unet(params: Mapping[str, Any]) -> UNet2DConditionModel:
    """Make an untrained U-Net from the `params` of a yaml's UNetModel.

    Raises:
        InputError: naming an option that is missing, unknown or cannot be expressed by diffusers' U-Net.
    """
    options = _options("UNetModel", params, _UNET_OPTIONS, _UNET_FIXED, _UNET_FREE)
    for name in ("num_res_blocks", "transformer_depth", "context_dim"):
        if not isinstance(options[name], int):
            raise InputError(f"UNetModel's {name} must be one number, got {options[name]}")
    channels = [options["model_channels"] * factor for factor in options["channel_mult"]]
    _check_groups("model_channels", channels, options["norm_num_groups"])
    attended = [2**level in list(options["attention_resolutions"]) for level in range(len(channels))]
    prepare_torchvision()  # diffusers imports it where it is installed
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=options["image_size"],
        in_channels=options["in_channels"],
        out_channels=options["out_channels"],
        block_out_channels=channels,
        layers_per_block=options["num_res_blocks"],
        down_block_types=["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attended],
        up_block_types=["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attended)],
        attention_head_dim=_heads(options, channels),  # diffusers' word for the number of heads
        cross_attention_dim=options["context_dim"],
        transformer_layers_per_block=options["transformer_depth"],
        num_class_embeds=options["num_classes"],
        resnet_time_scale_shift="scale_shift" if options["use_scale_shift_norm"] else "default",
        dropout=options["dropout"],
        norm_num_groups=options["norm_num_groups"],
    )


def build_ldm_first_stage(params: Mapping[str, Any], kind: str, scale_factor: float = 1.0) -> VQModel | AutoencoderKL:
    """Make an untrained first stage from the `params` of a yaml's VQModelInterface or AutoencoderKL: ddconfig, embed_dim and n_embed.

    Args:
        kind: "vq" or "kl".
        scale_factor: of the diffusion model, what its latents are multiplied by; kept in the network's configuration.

    Raises:
        InputError: naming an option that is missing, unknown or cannot be expressed by diffusers' networks.
    """
    if kind not in ("vq", "kl"):
        raise InputError(f"unknown kind of first stage '{kind}'; choose from vq, kl")
    outer = _options("the first stage", params, _FIRST_STAGE_OPTIONS, _FIRST_STAGE_FIXED, _FIRST_STAGE_FREE)
    options = _options("ddconfig", outer["ddconfig"], _DDCONFIG_OPTIONS, _DDCONFIG_FIXED, set())
    if bool(options["double_z"]) != (kind == "kl"):
        raise InputError(f"ddconfig's double_z: {options['double_z']} does not belong to a {kind} first stage; pass the other kind")
    if options["attn_type"] not in ("vanilla", "none"):
        raise InputError(f"ddconfig's attn_type: {options['attn_type']} cannot be expressed by diffusers' autoencoders; only vanilla and none can be loaded")
    channels = [options["ch"] * factor for factor in options["ch_mult"]]
    _check_groups("ch", channels)
    vanilla = options["attn_type"] == "vanilla"
    attended = [vanilla and options["resolution"] // 2**level in list(options["attn_resolutions"]) for level in range(len(channels))]
    common: dict[str, Any] = {
        "in_channels": options["in_channels"],
        "out_channels": options["out_ch"],
        "block_out_channels": channels,
        "layers_per_block": options["num_res_blocks"],
        "down_block_types": ["AttnDownEncoderBlock2D" if yes else "DownEncoderBlock2D" for yes in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if yes else "UpDecoderBlock2D" for yes in reversed(attended)],
        "latent_channels": options["z_channels"],
        "sample_size": options["resolution"],
        "scaling_factor": scale_factor,
        "mid_block_add_attention": vanilla,
    }
    prepare_torchvision()
    from diffusers import AutoencoderKL, VQModel

    if kind == "vq":
        if outer["n_embed"] is None:
            raise InputError("the first stage lacks n_embed, the number of codes; add it to params")
        return VQModel(**common, num_vq_embeddings=outer["n_embed"], vq_embed_dim=outer["embed_dim"])
    if outer["embed_dim"] != options["z_channels"]:
        raise InputError(f"embed_dim {outer['embed_dim']} differs from z_channels {options['z_channels']}, which diffusers' AutoencoderKL cannot express")
    return AutoencoderKL(**common)


def _options(what: str, given: Mapping[str, Any], known: Mapping[str, Any], fixed: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    if unknown := [name for name in given if name not in known and name not in fixed and name not in free]:
        raise InputError(f"unknown option {', '.join(unknown)} of {what}; choose from {', '.join([*known, *fixed])}")
    if refused := [name for name, only in fixed.items() if given.get(name, only) != only]:
        names, only = (", ".join(f"{name}: {values[name]}" for name in refused) for values in (given, fixed))
        raise InputError(f"{what}'s {names} cannot be expressed by diffusers' networks; only {only} can be loaded")
    if missing := [name for name, default in known.items() if default is _NEEDED and name not in given]:
        raise InputError(f"{what} lacks {', '.join(missing)}; take params from the yaml that the weights were trained with")
    return {name: given.get(name, default) for name, default in known.items()}


def _check_groups(name: str, channels: Sequence[int], groups: int = 32) -> None:
    if any(width % groups for width in channels):
        raise InputError(f"all widths must be divisible by {groups}, the groups of the norms; {name} makes {list(channels)}")


def _heads(options: Mapping[str, Any], channels: Sequence[int]) -> list[int]:
    width, heads = options["num_head_channels"], options["num_heads"]
    if width == -1 and heads == -1:
        raise InputError("UNetModel has neither num_heads nor num_head_channels; add one of them to params")
    counts = [heads if width == -1 else count // width for count in channels]
    if min(counts) < 1:
        raise InputError(f"UNetModel's num_head_channels {width} is more than its narrowest level has, {min(channels)}; choose a divisor")
    return counts
