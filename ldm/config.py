"""LDM's yaml files, read without running anything in them: which U-Nets, which class embedders, which first stage, which noise schedule.

The layout is the published one. A `target` is a class of CompVis' code; only its last word counts here, and says which of our builders reads `params`.
A list in place of one `unet_config` makes a stitched pair, small first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tstitch.checkpoints import first_line
from tstitch.errors import InputError

FIRST_STAGES = {"VQModelInterface": "vq", "VQModel": "vq", "AutoencoderKL": "kl", "Autoencoder": "diffusers"}
DIFFUSIONS = ("LatentDiffusion",)
LR_SCHEDULES = ("LambdaWarmUpCosineScheduler",)


@dataclass(frozen=True)
class FirstStageConfig:
    """An autoencoder.

    Args:
        kind: "vq" or "kl" (CompVis' own, made of `params`), or "diffusers" (a folder or hub name at `path`).
        params: what `ldm.networks.build_ldm_first_stage` takes.
        path: weights, None where none are named.
    """

    kind: str
    params: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None


@dataclass(frozen=True)
class LDMConfig:
    """The model of a yaml.

    Args:
        unets: `params` of each UNetModel, small first.
        embedders: `params` of each ClassEmbedder: embed_dim, n_classes (rows of the table), ucg_rate (share of labels replaced by its last row).
        betas: arguments of `ldm.sampling.ldm_betas`.
        latent_shape: (C, H, W).
        training: what else `params` says: loss_type, l_simple_weight, original_elbo_weight, learn_logvar, snr_gamma, ema_decay, scheduler_config.
    """

    unets: tuple[Mapping[str, Any], ...]
    embedders: tuple[Mapping[str, Any], ...]
    first_stage: FirstStageConfig
    betas: Mapping[str, Any]
    latent_shape: tuple[int, int, int]
    scale_factor: float = 1.0
    base_learning_rate: float = 1e-6
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Classes without the null label, which is there where labels are dropped."""
        table = self.embedders[0]
        return table.get("n_classes", 1000) - (table.get("ucg_rate", 0) > 0)


_TRAINING: dict[str, Any] = {
    "loss_type": "l2", "l_simple_weight": 1.0, "original_elbo_weight": 0.0, "learn_logvar": False, "logvar_init": 0.0, "snr_gamma": None, "use_ema": True,
    "ema_decay": 0.9999, "cond_stage_trainable": True, "adam_betas": [0.9, 0.999], "weight_decay": 0.01, "scheduler_config": None,
}  # fmt: skip
# Options of the published files that change nothing here, or that have one value only.
_FREE = {"num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "monitor", "small_ratio", "ckpt_path", "ignore_keys", "concat_mode"}
_FIXED = {"conditioning_key": "crossattn", "scale_by_std": False, "parameterization": "eps", "v_posterior": 0.0, "use_positional_encodings": False}


def read_yaml(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merge yaml files left to right, then dotted overrides ("model.params.channels=3").

    Raises:
        InputError: if a file is missing or no yaml, or an override is no key=value.
    """
    if wrong := [text for text in overrides if "=" not in text or text.startswith("-")]:
        raise InputError(f"unknown argument {wrong[0]}; an override of the configuration is written as key=value, a flag is listed by --help")
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"no configuration at {path}; choose one from ldm/configs")
    try:
        merged = OmegaConf.merge(*(OmegaConf.load(path) for path in paths), OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{', '.join(map(str, paths))} is not a usable yaml ({first_line(error)}); repair it") from None
    if not isinstance(content, dict):
        raise InputError(f"{', '.join(map(str, paths))} holds no mapping; a configuration has the keys model, data and lightning")
    return content


def read_model(content: Mapping[str, Any]) -> LDMConfig:
    """Read the `model` section of a LatentDiffusion.

    Raises:
        InputError: naming what is missing, unknown or cannot be had.
    """
    model = _section(content, "model")
    params = dict(_params(model, DIFFUSIONS, "model"))
    unets = [_params(_unwrap(entry, "unet_config"), ("UNetModel",), "unet_config") for entry in _listed(params, "unet_config")]
    embedders = [_params(_unwrap(entry, "cond_stage_config"), ("ClassEmbedder",), "cond_stage_config") for entry in _listed(params, "cond_stage_config")]
    if len(unets) != len(embedders):
        raise InputError(f"the configuration has {len(unets)} U-Nets and {len(embedders)} class embedders; give one to each")
    first_stage = read_first_stage(_section(params, "first_stage_config"))
    betas = {name: params.pop(name) for name in ("timesteps", "linear_start", "linear_end", "beta_schedule") if name in params}
    size, channels, scale = params.pop("image_size", None), params.pop("channels", 3), params.pop("scale_factor", 1.0)
    for part in ("unet_config", "cond_stage_config", "first_stage_config"):
        params.pop(part)
    if not isinstance(size, int) or not isinstance(channels, int):
        raise InputError(f"model.params needs image_size and channels, the height and the channels of the latents; got {size} and {channels}")
    if refused := [f"{name}: {params[name]}" for name, only in _FIXED.items() if params.get(name, only) != only]:
        raise InputError(f"model.params has {', '.join(refused)}, which is not supported; leave it out")
    if unknown := [name for name in params if name not in _TRAINING and name not in _FREE and name not in _FIXED]:
        raise InputError(f"unknown option {', '.join(unknown)} of model.params; choose from {', '.join([*_TRAINING, *_FIXED])}")
    training = _TRAINING | {name: params[name] for name in _TRAINING if name in params}
    rate = model.get("base_learning_rate", 1e-6)
    return LDMConfig(tuple(unets), tuple(embedders), first_stage, betas, (channels, size, size), float(scale), float(rate), training)


def read_first_stage(config: Mapping[str, Any]) -> FirstStageConfig:
    """Read a first stage: `first_stage_config`, or the `model` section of a yaml that trains one.

    Raises:
        InputError: naming what is missing or unknown.
    """
    params = dict(_params(config, FIRST_STAGES, "first_stage_config"))
    kind = FIRST_STAGES[_last_word(config["target"])]
    path = params.pop("ckpt_path", None)
    if kind == "diffusers" and (path is None or params):
        raise InputError(f"the first stage Autoencoder takes ckpt_path alone, a folder or a hub name; got {', '.join(params) or 'nothing'}")
    return FirstStageConfig(kind, params, path)


def _last_word(target: object) -> str:
    return str(target).rsplit(".", 1)[-1]


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise InputError(f"the configuration has no section {name}; take one of ldm/configs as a pattern")
    return section


def _params(config: Mapping[str, Any], classes: Sequence[str] | Mapping[str, Any], what: str) -> Mapping[str, Any]:
    if _last_word(config.get("target")) not in classes:
        raise InputError(f"{what} has the target {config.get('target')}; choose from {', '.join(classes)}")
    return _section(config, "params")


def _listed(params: Mapping[str, Any], name: str) -> list[Any]:
    if name not in params:
        raise InputError(f"model.params has no {name}; take one of ldm/configs as a pattern")
    return params[name] if isinstance(params[name], list) else [params[name]]


def _unwrap(entry: Any, name: str) -> Mapping[str, Any]:  # noqa: ANN401  (an entry of a yaml)
    """In the published pair each entry of the list repeats the list's name."""
    entry = entry.get(name, entry) if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping):
        raise InputError(f"{name} is a mapping with target and params, or a list of them; got {entry}")
    return entry
