"""How others name a DiT's tensors, and what its shapes say about it. Names and shapes only: no file, no network.

Everything is brought to the published DiT names (facebookresearch/DiT). What shapes cannot tell (heads; the position encoding and the size of the
latents where there is no pos_embed) comes from what the trainer wrote beside the weights, or from the caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tstitch.errors import InputError
from tstitch.torchvision_compat import prepare_torchvision

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # published depth, hidden size, heads

# A name in diffusers' DiTTransformer2DModel -> the published one. to_q, to_k and to_v become one matrix and are handled apart.
_DIFFUSERS_NAMES = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"embedders\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"embedders\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"embedders\.class_embedder\.", "y_embedder."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.attn1\.", r"blocks.\1.attn."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)


def layout_of(names: Collection[str]) -> str | None:
    """Whose names these are: "DiT" (also fast-DiT, T-Stitch, SiT), "GTA", "REPA", "diffusers", or None."""
    if {"pos_embed.proj.weight", "transformer_blocks.0.norm1.linear.weight", "proj_out_2.weight"} <= set(names):
        return "diffusers"
    if not {"x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight"} <= set(names):
        return None
    if any(name.startswith("projectors.") for name in names):
        return "REPA"
    return "GTA" if "blocks.0.attn.q_norm.scale" in names else "DiT"


def to_published(state: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Tensor], list[str]]:
    """Rename a state dict to the published names.

    Returns:
        The layout it had (see `layout_of`), the renamed state dict, and a sentence for each thing that was left out or merged. The position embedding
        of diffusers is not in its files; `sincos_position_embedding` makes it.

    Raises:
        InputError: if diffusers' blocks do not share their embedders, as those of a DiT do.
    """
    state, notes = dict(state), []
    for wrapper in ("module.", "_orig_mod."):
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
            notes.append(f"took the prefix '{wrapper}' off {len(state)} names")
    layout = layout_of(state)
    if layout == "REPA":
        heads = [name for name in state if name.startswith("projectors.")]
        notes.append(f"left out {len(heads)} tensors of the alignment heads (projectors.*), which only training uses")
        state = {name: value for name, value in state.items() if name not in heads}
    elif layout == "diffusers":
        state = _from_diffusers(state)
        notes.append("merged to_q, to_k, to_v into qkv, and the embedders that each block repeats into one")
    return layout, state, notes


def _from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    shared: dict[str, Tensor] = {}
    for name, value in state.items():
        shared_name = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "embedders.", name)
        if shared_name in shared and not torch.equal(shared[shared_name], value):
            raise InputError(f"{name} differs from the first block's; a DiT has one embedder for all blocks, so this model cannot become one")
        shared.setdefault(shared_name, value)
    shared.pop("pos_embed.pos_embed", None)  # files of early versions hold it; it is made anew for all
    renamed: dict[str, Tensor] = {}
    for name, value in shared.items():
        for pattern, replacement in _DIFFUSERS_NAMES:
            name, count = re.subn("^" + pattern, replacement, name)
            if count:
                break
        renamed[name] = value
    for name in [name for name in renamed if ".attn.to_q." in name]:
        q, k, v = renamed.pop(name), renamed.pop(name.replace("to_q", "to_k"), None), renamed.pop(name.replace("to_q", "to_v"), None)
        if k is None or v is None:
            raise InputError(f"{name} has no to_k or to_v beside it; the file is incomplete")
        renamed[name.replace("to_q", "qkv")] = torch.cat([q, k, v])
    return renamed


def sincos_position_embedding(width: int, grid: int) -> Tensor:
    """The position embedding that diffusers' DiT adds and does not store; float32 (1, grid * grid, width)."""
    prepare_torchvision()
    from diffusers.models.embeddings import get_2d_sincos_pos_embed  # seconds to import

    return get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float().unsqueeze(0)


def hints_from(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer's command line, or diffusers' config.json, says that shapes do not: num_heads, input_size, num_classes, posenc."""
    pixels = arguments.get("image_size", arguments.get("resolution"))
    latents = pixels // 8 if isinstance(pixels, int) else None  # published trainers know only 8x autoencoders
    told = {
        "num_heads": arguments.get("num_attention_heads"),
        "input_size": arguments.get("sample_size", latents),
        "num_classes": arguments.get("num_embeds_ada_norm", arguments.get("num_classes")),
        "posenc": arguments.get("posenc"),
    }
    return {key: value for key, value in told.items() if isinstance(value, str if key == "posenc" else int)}


def config_from_shapes(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None, num_classes: int | None = None, posenc: str | None = None
) -> dict[str, Any]:
    """Constructor arguments of the DiT that these tensors, under published names, belong to.

    Args:
        num_heads: needed for a width that was not published, unless q and k are normalised (the norm's length is a head's).
        input_size: height and width of the latents; needed where there is no pos_embed.
        num_classes: tells a label table without a null label from one with it; None takes the last row for the null label, as published.
        posenc: "rope" or "gta"; needed where there is no pos_embed.

    Raises:
        InputError: naming what has to be said, or what contradicts the shapes.
    """
    needed = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in state]:
        raise InputError(f"{', '.join(missing)} is missing; the file is incomplete or no class-conditional DiT")
    hidden, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    qk_norm = "blocks.0.attn.q_norm.scale" in state
    if qk_norm:
        num_heads = hidden // len(state["blocks.0.attn.q_norm.scale"])
    num_heads = num_heads or {width: heads for _, width, heads in SIZES.values()}.get(hidden)
    if num_heads is None:
        raise InputError(
            f"weights do not tell heads, and width {hidden} is none of the published {[width for _, width, _ in SIZES.values()]}; pass --num-heads"
        )
    if (input_size or 0) % patch:
        raise InputError(f"latents of size {input_size} cannot be cut into patches of {patch}; choose a multiple")
    if "pos_embed" in state:
        posenc, input_size = "abs", math.isqrt(state["pos_embed"].shape[1]) * patch
    elif posenc not in ("rope", "gta"):
        raise InputError("there is no pos_embed, and the same tensors make a rope and a gta model; pass --posenc rope or --posenc gta")
    elif input_size is None:
        raise InputError("there is no pos_embed to tell the size of the latents; pass --input-size, 32 for 256x256 pictures behind an 8x autoencoder")
    rows = len(state["y_embedder.embedding_table.weight"])
    num_classes = rows - 1 if num_classes is None else num_classes
    if num_classes not in (rows - 1, rows):
        raise InputError(f"the label table has {rows} rows, which is not {num_classes} classes with or without a null label; pass another --num-classes")
    return {
        "input_size": input_size,
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": num_heads,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / hidden,
        "class_dropout_prob": 0.1 if num_classes < rows else 0.0,
        "num_classes": num_classes,
        "learn_sigma": len(state["final_layer.linear.weight"]) == 2 * patch * patch * in_channels,
        "posenc": posenc,
        "qk_norm": qk_norm,
    }


def published_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict of a DiT with these constructor arguments, in the published order."""
    d, c, p = config["hidden_size"], config["in_channels"], config["patch_size"]
    hidden = int(d * config["mlp_ratio"])
    rows = config["num_classes"] + (config["class_dropout_prob"] > 0)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, (config["input_size"] // p) ** 2, d)} if config["posenc"] == "abs" else {}
    shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.bias"] = (d, c, p, p), (d,)

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    linear("t_embedder.mlp.0", 256, d)
    linear("t_embedder.mlp.2", d, d)
    shapes["y_embedder.embedding_table.weight"] = (rows, d)
    for k in range(config["depth"]):
        linear(f"blocks.{k}.attn.qkv", d, 3 * d)
        if config["qk_norm"]:
            shapes |= {f"blocks.{k}.attn.{part}_norm.scale": (d // config["num_heads"],) for part in "qk"}
        linear(f"blocks.{k}.attn.proj", d, d)
        linear(f"blocks.{k}.mlp.fc1", d, hidden)
        linear(f"blocks.{k}.mlp.fc2", hidden, d)
        linear(f"blocks.{k}.adaLN_modulation.1", d, 6 * d)
    linear("final_layer.linear", d, p * p * c * (1 + config["learn_sigma"]))
    linear("final_layer.adaLN_modulation.1", d, 2 * d)
    return shapes


def model_name(config: Mapping[str, Any]) -> str:
    """Published name, such as DiT-XL/2, or the sizes of a model that has none."""
    size = tuple(config[key] for key in ("depth", "hidden_size", "num_heads"))
    known = {sizes: letters for letters, sizes in SIZES.items()}
    if size in known:
        return f"DiT-{known[size]}/{config['patch_size']}"
    return "DiT of depth {}, width {}, {} heads, patch {}".format(*size, config["patch_size"])
