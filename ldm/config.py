"""LDM's yaml files, read without running anything in them: which U-Nets, which class embedders, which first stage, which noise schedule.

The layout is the published one. A `target` is a class of CompVis' code; only its last word counts here, and says which of our builders reads `params`.
A list in place of one `unet_config` makes a stitched pair, small first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
TRAINED_FIRST_STAGES = ("VQModel", "AutoencoderKL")
LOSSES = {"vq": ("VQLPIPSWithDiscriminator",), "kl": ("LPIPSWithDiscriminator",)}
LR_SCHEDULES = ("LambdaWarmUpCosineScheduler",)
SECTIONS = ("model", "data", "lightning", "run")  # run is what a run folder's config.yaml says of its command line


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
        training: what else `params` says: loss_type, l_simple_weight, original_elbo_weight, learn_logvar, snr_gamma, ema_decay, scheduler_config,
            ckpt_path (weights to start from), monitor (the measure of the best checkpoints).
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


@dataclass(frozen=True)
class AutoencoderConfig:
    """The model of a yaml that trains a first stage.

    Args:
        kind: "vq" or "kl".
        params: what `ldm.networks.build_ldm_first_stage` takes.
        loss: weights of `ldm.first_stage_training.FirstStageLoss`.
        training: use_ema, ema_decay, adam_betas, weight_decay, lr_g_factor, scheduler_config, ckpt_path, monitor.
    """

    kind: str
    params: Mapping[str, Any]
    loss: Mapping[str, Any]
    base_learning_rate: float
    training: Mapping[str, Any]


_COMMON: dict[str, Any] = {"ema_decay": 0.9999, "scheduler_config": None, "ckpt_path": None, "monitor": None}
_TRAINING: dict[str, Any] = _COMMON | {
    "loss_type": "l2", "l_simple_weight": 1.0, "original_elbo_weight": 0.0, "learn_logvar": False, "logvar_init": 0.0, "snr_gamma": None, "use_ema": True,
    "cond_stage_trainable": True, "adam_betas": [0.9, 0.999], "weight_decay": 0.01,
}  # fmt: skip
# Options of the published files that change nothing here, or that have one value only.
_FREE = {"num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "small_ratio", "concat_mode"}
_FIXED = {
    "conditioning_key": "crossattn", "scale_by_std": False, "parameterization": "eps", "v_posterior": 0.0, "use_positional_encodings": False,
    "ignore_keys": [],
}  # fmt: skip
_FIRST_STAGE_TRAINING: dict[str, Any] = _COMMON | {"use_ema": False, "adam_betas": [0.5, 0.9], "weight_decay": 0.0, "lr_g_factor": 1.0}
_FIRST_STAGE_FREE = {"image_key"}
_FIRST_STAGE_FIXED = {"batch_resize_range": None, "colorize_nlabels": None, "ignore_keys": []}
_LOSS: dict[str, Any] = {
    "disc_start": 0, "disc_num_layers": 3, "disc_in_channels": 3, "disc_ndf": 64, "disc_weight": 1.0, "disc_factor": 1.0, "perceptual_weight": 1.0,
    "pixelloss_weight": 1.0,
}  # fmt: skip
_LOSS_FIXED = {
    "use_actnorm": False, "disc_conditional": False, "disc_loss": "hinge", "pixel_loss": "l1", "perceptual_loss": "lpips", "logvar_init": 0.0,
    "n_classes": None,
}  # fmt: skip
_PLAIN = {"perceptual_weight": 0.0, "disc_weight": 0.0}  # without a lossconfig: pixels and bottleneck alone


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
    check_names("the configuration", content, SECTIONS)
    return content


def check_names(what: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse options that nobody reads.

    Raises:
        InputError: naming them and what there is.
    """
    known = list(known)
    if unknown := [str(name) for name in given if name not in known]:
        raise InputError(f"unknown option {', '.join(unknown)} of {what}; choose from {', '.join(known)}")


def read_model(content: Mapping[str, Any]) -> LDMConfig:
    """Read the `model` section of a LatentDiffusion.

    Raises:
        InputError: naming what is missing, unknown or cannot be had.
    """
    model = _section(content, "model")
    params = dict(_params(model, DIFFUSIONS, "model"))
    unets = [_params(_unwrap(entry, "unet_config"), ("UNetModel",), "unet_config") for entry in _listed(params, "unet_config")]
    embedders = [_params(_unwrap(entry, "cond_stage_config"), ("ClassEmbedder",), "cond_stage_config") for entry in _listed(params, "cond_stage_config")]
    for table in embedders:
        check_names("cond_stage_config", table, ("embed_dim", "n_classes", "ucg_rate", "key"))
        if "embed_dim" not in table:
            raise InputError("cond_stage_config lacks embed_dim, the width of the class embedding; add it to its params")
    _check_loss(params)
    if len(unets) != len(embedders):
        raise InputError(f"the configuration has {len(unets)} U-Nets and {len(embedders)} class embedders; give one to each")
    first_stage = read_first_stage(_section(params, "first_stage_config"))
    betas = {name: params.pop(name) for name in ("timesteps", "linear_start", "linear_end", "beta_schedule") if name in params}
    if missing := [name for name in ("linear_start", "linear_end") if name not in betas and betas.get("beta_schedule") != "cosine"]:
        raise InputError(f"model.params lacks {', '.join(missing)}, the ends of the noise schedule; take them from the yaml that the weights were trained with")
    size, channels, scale = params.pop("image_size", None), params.pop("channels", 3), params.pop("scale_factor", 1.0)
    for part in ("unet_config", "cond_stage_config", "first_stage_config"):
        params.pop(part)
    if not isinstance(size, int) or not isinstance(channels, int):
        raise InputError(f"model.params needs image_size and channels, the height and the channels of the latents; got {size} and {channels}")
    for unet, table in zip(unets, embedders, strict=True):
        _check_unet(unet, table["embed_dim"], channels, size)
    training = _training("model.params", params, _TRAINING, _FIXED, _FREE)
    rate = _base_learning_rate(model, 1e-6)
    return LDMConfig(tuple(unets), tuple(embedders), first_stage, betas, (channels, size, size), float(scale), rate, training)


def _check_loss(params: Mapping[str, Any]) -> None:
    weights = {"l_simple_weight": 1.0, "original_elbo_weight": 0.0, "learn_logvar": False, "logvar_init": 0.0}
    if params.get("snr_gamma") is not None and (given := [name for name, neutral in weights.items() if params.get(name, neutral) != neutral]):
        raise InputError(f"model.params has snr_gamma and {', '.join(given)}, which weigh the loss in two ways; leave one of them out")


def _check_unet(unet: Mapping[str, Any], embed_dim: int, channels: int, size: int) -> None:
    """Refuse a U-Net that contradicts what surrounds it; what it lacks besides is found where it is built."""
    if unet.get("num_classes") is not None:
        raise InputError("UNetModel's num_classes adds a label embedding that nothing here feeds; leave it out, the class embedder takes the labels")
    if unet.get("image_size") is None:
        raise InputError(f"UNetModel lacks image_size, the height of its latents; add image_size: {size} to the params of unet_config")
    expected = {"context_dim": ("cond_stage_config's embed_dim", embed_dim), "image_size": ("model.params.image_size", size)}
    for name, (other, value) in (expected | dict.fromkeys(("in_channels", "out_channels"), ("model.params.channels", channels))).items():
        if unet.get(name, value) != value:
            raise InputError(f"UNetModel's {name} is {unet[name]}, {other} {value}; make them the same")


def trains_first_stage(content: Mapping[str, Any]) -> bool:
    """Whether the `model` section is of a first stage."""
    return _last_word(_section(content, "model").get("target")) in TRAINED_FIRST_STAGES


def read_autoencoder(content: Mapping[str, Any]) -> AutoencoderConfig:
    """Read the `model` section of a VQModel or AutoencoderKL.

    Raises:
        InputError: naming what is missing, unknown or cannot be had.
    """
    model = _section(content, "model")
    kind = FIRST_STAGES[_last_word(model["target"])]
    params = dict(_params(model, TRAINED_FIRST_STAGES, "model"))
    network = {name: params.pop(name) for name in ("ddconfig", "embed_dim", "n_embed", "remap", "sane_index_shape") if name in params}
    lossconfig = params.pop("lossconfig", None)
    training = _training("model.params", params, _FIRST_STAGE_TRAINING, _FIRST_STAGE_FIXED, _FIRST_STAGE_FREE)
    defaults = _LOSS | {"codebook_weight" if kind == "vq" else "kl_weight": 1.0}
    if lossconfig is None:
        loss = defaults | _PLAIN
    else:
        loss = _training("lossconfig", dict(_params(lossconfig, LOSSES[kind], "lossconfig")), defaults, _LOSS_FIXED, set())
    return AutoencoderConfig(kind, network, loss, _base_learning_rate(model, 4.5e-6), training)


def _base_learning_rate(model: Mapping[str, Any], default: float) -> float:
    check_names("model", model, ("target", "params", "base_learning_rate"))
    rate = model.get("base_learning_rate", default)
    if not isinstance(rate, (int, float)):
        raise InputError(f"model.base_learning_rate must be a number, got {rate}")
    return float(rate)


def _training(what: str, params: Mapping[str, Any], known: Mapping[str, Any], fixed: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    """The options `known` with their values or defaults; `fixed` have one value only, `free` do nothing here."""
    if refused := [f"{name}: {params[name]}" for name, only in fixed.items() if params.get(name, only) != only]:
        raise InputError(f"{what} has {', '.join(refused)}, which is not supported; leave it out")
    check_names(what, {name: None for name in params if name not in free}, [*known, *fixed])
    return {name: params.get(name, default) for name, default in known.items()}


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
