"""CompVis latent diffusion checkpoints in diffusers' networks, and back.

A `LatentDiffusion` file holds the U-Net, its moving average under names without dots, the class embedder, perhaps the first stage and the schedule; a
T-Stitch file holds two U-Nets with their embedders, the small one first. `read_ldm` takes such a file apart, `load_*` make networks of the parts from the
`params` of the same yaml, and `compvis_state_dict` and `LDMCheckpoint.state_dict` go the other way, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ldm.denoiser import LatentDenoiser
from ldm.names import compvis_names, compvis_shape
from ldm.networks import build_ldm_first_stage, build_ldm_unet
from tstitch.checkpoints import check_shapes, read_checkpoint
from tstitch.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel

# What a LatentDiffusion file holds besides its networks.
_BUFFERS = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2", "logvar", "scale_factor", "model_ema.decay", "model_ema.num_updates",
}  # fmt: skip


def load_ldm_unet(state_dict: Mapping[str, Tensor], params: Mapping[str, Any], source: str | Path = "the U-Net") -> UNet2DConditionModel:
    """Load a U-Net in eval mode, float32.

    Args:
        state_dict: tensors of CompVis' UNetModel, names without prefix ("input_blocks.0.0.weight").
        params: `params` of the yaml's UNetModel.
        source: what an error names.

    Raises:
        InputError: as `build_ldm_unet`, or naming tensors that are missing, left over or of another shape.
    """
    return load_compvis(build_ldm_unet(params), state_dict, source)


def load_ldm_first_stage(
    state_dict: Mapping[str, Tensor], params: Mapping[str, Any], kind: str = "vq", scale_factor: float = 1.0, source: str | Path = "the first stage"
) -> VQModel | AutoencoderKL:
    """Load a first stage in eval mode, float32; names without prefix ("encoder.conv_in.weight"), the other arguments as in `build_ldm_first_stage`.

    Raises:
        InputError: as `build_ldm_first_stage`, or naming tensors that are missing, left over or of another shape.
    """
    return load_compvis(build_ldm_first_stage(params, kind, scale_factor), state_dict, source)


def load_compvis(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> Any:  # noqa: ANN401  (what came in)
    """Load tensors under CompVis' names into a UNet2DConditionModel, VQModel or AutoencoderKL, and put it into eval mode.

    Raises:
        InputError: naming tensors that are missing, left over or of another shape.
    """
    names, own = compvis_names(model), model.state_dict()
    check_shapes({names[name]: compvis_shape(names[name], value.shape) for name, value in own.items()}, state, source)
    model.load_state_dict({name: state[names[name]].reshape(value.shape) for name, value in own.items()})
    return model.eval()


def compvis_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of a UNet2DConditionModel, VQModel or AutoencoderKL under CompVis' names: what `load_ldm_unet` and `load_ldm_first_stage` read."""
    names = compvis_names(model)
    return {names[name]: value.reshape(compvis_shape(names[name], value.shape)) for name, value in model.state_dict().items()}


@dataclass
class LDMCheckpoint:
    """The parts of a LatentDiffusion file, each under its own names, without prefixes.

    Args:
        unets: one U-Net, or the two of a T-Stitch file, small first.
        ema: their moving averages under the same names; [] where the file has none.
        embedders: "embedding.weight" of the class embedders, one for each U-Net.
        first_stage: the autoencoder; {} where the file has none.
        buffers: schedule, counters of the moving average, scale_factor, logvar.
    """

    unets: list[dict[str, Tensor]]
    ema: list[dict[str, Tensor]] = field(default_factory=list)
    embedders: list[dict[str, Tensor]] = field(default_factory=list)
    first_stage: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], source: str | Path = "the checkpoint") -> LDMCheckpoint:
        """Take a LatentDiffusion state dict apart.

        Raises:
            InputError: naming keys that belong to no part, or those that the moving average lacks.
        """
        unets: dict[int, dict[str, Tensor]] = {}
        embedders: dict[int, dict[str, Tensor]] = {}
        first_stage, buffers, flat, unknown = {}, {}, {}, []
        for key, value in state.items():
            if match := re.match(r"model\.diffusion_model\.(?:anchors\.(\d+)\.)?(.+)", key):
                unets.setdefault(int(match[1] or 0), {})[match[2]] = value
            elif match := re.match(r"cond_stage_model\.(?:(\d+)\.)?(embedding\.weight)$", key):
                embedders.setdefault(int(match[1] or 0), {})[match[2]] = value
            elif key.startswith("first_stage_model."):
                first_stage[key.removeprefix("first_stage_model.")] = value
            elif key in _BUFFERS:
                buffers[key] = value
            elif key.startswith("model_ema."):
                flat[key] = value
            else:
                unknown.append(key)
        if not unets:
            raise InputError(f"{source} holds no model.diffusion_model.*; pass a LatentDiffusion checkpoint")
        found = cls([unets[k] for k in sorted(unets)], [], [embedders[k] for k in sorted(embedders)], first_stage, buffers)
        if flat:
            wanted = [{name: _ema_name(found._prefix(k) + name) for name in unet} for k, unet in enumerate(found.unets)]
            if missing := [key for names in wanted for key in names.values() if key not in flat]:
                raise InputError(f"{source} has a moving average that lacks {_some(missing)}; the file is damaged")
            found.ema = [{name: flat.pop(key) for name, key in names.items()} for names in wanted]
        if unknown := [*unknown, *flat]:
            raise InputError(f"{source} holds {_some(unknown)}, which no class-conditional LatentDiffusion has; pass a checkpoint of one")
        if found.embedders and len(found.embedders) != len(found.unets):
            raise InputError(f"{source} holds {len(found.unets)} U-Nets and {len(found.embedders)} class embedders; the file is damaged")
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Inverse of `from_state_dict`."""
        state = dict(self.buffers)
        for k, unet in enumerate(self.unets):
            state |= {f"model.{self._prefix(k)}{name}": value for name, value in unet.items()}
        for k, unet in enumerate(self.ema):
            state |= {_ema_name(self._prefix(k) + name): value for name, value in unet.items()}
        for k, embedder in enumerate(self.embedders):
            state |= {f"cond_stage_model.{f'{k}.' if len(self.unets) > 1 else ''}{name}": value for name, value in embedder.items()}
        return state | {f"first_stage_model.{name}": value for name, value in self.first_stage.items()}

    def unet(self, k: int = 0, use: str | None = None) -> dict[str, Tensor]:
        """Tensors of U-Net k: "ema" or "model"; None takes the moving average where there is one.

        Raises:
            InputError: if the file does not hold it.
        """
        use = use or ("ema" if self.ema else "model")
        held = {"model": self.unets, "ema": self.ema}
        if not held.get(use):
            raise InputError(f"the checkpoint holds no {use} weights; choose from {', '.join(name for name, parts in held.items() if parts)}")
        return held[use][k]

    def _prefix(self, k: int) -> str:
        return f"diffusion_model.anchors.{k}." if len(self.unets) > 1 else "diffusion_model."


def _ema_name(name: str) -> str:
    """Name of a moving average: CompVis drops the dots, which a buffer's name may not have."""
    return "model_ema." + name.replace(".", "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_ldm(path: str | Path) -> LDMCheckpoint:
    """Read a LatentDiffusion .ckpt, its tensors under `state_dict`.

    Raises:
        InputError: as `tstitch.checkpoints.read_checkpoint` and `LDMCheckpoint.from_state_dict`.
    """
    return LDMCheckpoint.from_state_dict(read_checkpoint(path).state(), path)


def read_ldm_first_stage(path: str | Path) -> dict[str, Tensor]:
    """Read a first stage from its own .ckpt, such as vq-f8/model.ckpt, or from a LatentDiffusion .ckpt that holds it; names without prefix.

    What only its training needs, the perceptual loss and the discriminator (`loss.*`), is left out.

    Raises:
        InputError: as `read_ldm`, or if there is no first stage.
    """
    state = read_checkpoint(path).state()
    if "encoder.conv_in.weight" not in state:
        state = LDMCheckpoint.from_state_dict(state, path).first_stage
    if not state:
        raise InputError(f"{path} holds no first_stage_model.*; pass the first stage's own checkpoint, such as vq-f8/model.ckpt")
    return {name: value for name, value in state.items() if not name.startswith("loss.")}


@dataclass(frozen=True)
class LDMFacts:
    """What sampling must know of a LatentDiffusion file before its networks are made.

    Args:
        has_null_label: its class embedders have a row more than classes.
        scale_factor: what its latents are multiplied by, where the file says it: a model that was trained with `scale_by_std` does.
    """

    has_null_label: bool
    scale_factor: float | None


def read_ldm_facts(path: str | Path, num_classes: int) -> LDMFacts:
    """Look into a LatentDiffusion file; `num_classes` counts where the file does not say it.

    Raises:
        InputError: as `read_ldm`.
    """
    file = read_checkpoint(path)
    parts = LDMCheckpoint.from_state_dict(file.state(), path)
    null = all(len(table["embedding.weight"]) > file.config.get("num_classes", num_classes) for table in parts.embedders)
    scale = parts.buffers.get("scale_factor")
    return LDMFacts(null, None if scale is None else float(scale))


def load_ldm_denoisers(
    path: str | Path, params: Sequence[Mapping[str, Any]] | None = None, num_classes: int = 1000, use: str | None = None
) -> list[LatentDenoiser]:
    """Load the denoisers of a LatentDiffusion .ckpt, one, or the two of a T-Stitch file, or of safetensors of ours; in eval mode, float32.

    Args:
        params: `params` of the yaml's UNetModel, for each U-Net in the file. These and num_classes count where the file does not say them itself.
        num_classes: classes without the null label; an embedder with one row more has learned that label.
        use: as in `LDMCheckpoint.unet`.

    Raises:
        InputError: as `read_ldm` and `load_ldm_unet`, or if the file holds another number of U-Nets or classes, or params are not known.
    """
    file = read_checkpoint(path)
    checkpoint = LDMCheckpoint.from_state_dict(file.state(), path)
    params = [file.config["unet"]] if "unet" in file.config else params
    num_classes = file.config.get("num_classes", num_classes)
    if params is None:
        raise InputError(f"{path} does not say what its U-Net looks like; pass the yaml that it was trained with")
    if len(params) != len(checkpoint.unets):
        raise InputError(f"{path} holds {len(checkpoint.unets)} U-Nets, and {len(params)} configurations were given; pass one for each")
    if not checkpoint.embedders:
        raise InputError(f"{path} holds no cond_stage_model.embedding.weight; pass a class-conditional LatentDiffusion checkpoint")
    denoisers = []
    for k, unet_params in enumerate(params):
        table = checkpoint.embedders[k]["embedding.weight"].float()
        if table.shape[1] != unet_params.get("context_dim"):
            raise InputError(f"{path}: class embedding {k} has width {table.shape[1]}, its U-Net's context_dim is {unet_params.get('context_dim')}")
        unet = load_ldm_unet(checkpoint.unet(k, use), unet_params, path)
        denoisers.append(LatentDenoiser(unet, nn.Embedding.from_pretrained(table, freeze=False), num_classes).eval())
    return denoisers
