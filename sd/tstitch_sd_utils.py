"""Stitch diffusers pipelines: a small U-Net takes the first steps, the pipeline's own the rest.

    pipe = stitch(pipe, small_unet)
    pipe("a squirrel in the park", unet_s_ratio=0.4)   # everything else as before

Any pipeline that calls `pipe.unet(sample, t, ...)` can be stitched: text-to-image, image-to-image, inpainting, ControlNet, LCM, SDXL, under any scheduler.
Nothing of a pipeline is copied: it gets a subclass of its own class, whose call takes one keyword more, and a `StitchedUNet` in place of its U-Net.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from sd.stitched_unet import UNET_OFFLOADS, StitchedUNet, small_folders
from tstitch.cli import parse_device
from tstitch.errors import InputError
from tstitch.files import read_json
from tstitch.hub import from_hub
from tstitch.presets import ROOT
from tstitch.schedule import StitchSchedule

Ratio = float | Sequence[float] | StitchSchedule
Source = str | Path
OFFLOADS = (*UNET_OFFLOADS, "model")
ADAPTER = "lora"  # peft's name for the one that `load_lora` puts into a U-Net

# The published pairs.
LARGE_SD, SMALL_SD = "Envvi/Inkpunk-Diffusion", "nota-ai/bk-sdm-tiny"
LARGE_SDXL, SMALL_SDXL = "stabilityai/stable-diffusion-xl-base-1.0", "segmind/SSD-1B"
LARGE_LCM_LORA, SMALL_LCM_LORA = "latent-consistency/lcm-lora-sdxl", "latent-consistency/lcm-lora-ssd-1b"
EMOJI = ROOT / "pretrained_models" / "emoji"  # the bundled pair in sd/, its autoencoder in vae/

_SWALLOWED = ("callback", "callback_steps")  # what pipelines with a **kwargs take from it; they ignore everything else

# What U-Nets must have in common to be called alike on the same latents, and what their training must have in common to be steps of one trajectory.
_SAME_CALL = (
    "in_channels", "out_channels", "sample_size", "cross_attention_dim", "encoder_hid_dim", "time_cond_proj_dim", "addition_embed_type",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim", "class_embed_type", "num_class_embeds",
)  # fmt: skip
_SAME_RESIDUALS = ("block_out_channels", "layers_per_block")
_SAME_TRAINING = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def stitch(
    pipe: DiffusionPipeline,
    small: nn.Module | DiffusionPipeline | Sequence[nn.Module | DiffusionPipeline] | None = None,
    *,
    offload: str = "none",
    small_scheduler: SchedulerMixin | Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """Give a pipeline a small U-Net for its first steps, in place.

    The call then takes `unet_s_ratio`: the small U-Net's share of the call's own steps in [0, 1], the rest is the large one's (default 0: as before). With more
    U-Nets it is a list of fractions, the noisiest part first, or a StitchSchedule that counts steps. An unknown keyword is a TypeError.

    Args:
        pipe: a pipeline with a U-Net, the large one.
        small: the small U-Net, or a pipeline that holds it; or several, the one for the noisiest steps first. They move to the large one's device and number
            type. None takes over the U-Nets of another stitched pipeline, whose components `pipe` was made of, with their offload.
        offload: "none", or "switch": only the running U-Net lies on the accelerator, and the next is fetched meanwhile.
        small_scheduler: a scheduler of the small U-Net, or its config, if known: how it was trained is compared, its prediction type first of all.

    Raises:
        InputError: if the U-Nets do not fit each other, naming the values that differ, or the pipeline has no U-Net, or its weights lie on no device.
    """
    if getattr(pipe, "unet", None) is None or getattr(pipe, "scheduler", None) is None:
        raise InputError(f"{type(pipe).__name__} has no U-Net and scheduler of its own to stitch; choose a pipeline that calls pipe.unet")
    if any(parameter.is_meta for parameter in pipe.unet.parameters()):
        raise InputError("the U-Net's weights lie on no device, as after enable_sequential_cpu_offload; stitch first, then offload")
    if small is None:
        unet = stitched_unet(pipe)
        if offload != "none" or small_scheduler is not None:
            raise InputError("stitch(pipe) takes over U-Nets as they are; pass offload and small_scheduler where they are first stitched")
        for other in unet.unets[:-1]:
            check_fit(pipe, other)  # the first pipeline may have had no ControlNet
    else:
        held, device = _uncompiled(pipe.unet), pipe.unet.device
        large = held.large if isinstance(held, StitchedUNet) else pipe.unet
        givers = list(small) if isinstance(small, Sequence) else [small]
        unets = [giver.unet if isinstance(giver, DiffusionPipeline) else giver for giver in givers]
        for giver, other in zip(givers, unets, strict=True):
            check_fit(pipe, other, giver.scheduler if isinstance(giver, DiffusionPipeline) else small_scheduler)
        for other in [*unets, large]:
            if other.dtype != large.dtype:
                other.to(large.dtype)
            if offload == "none":
                other.to(device)
        unet = StitchedUNet([*unets, large], offload, device)
    _exchange(pipe, unet, _stitched_class(getattr(type(pipe), "unstitched_class", type(pipe))))
    return pipe


def unstitch(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Restore a stitched pipeline in place: its own class, its own large U-Net; a pipeline that is not stitched stays as it is."""
    if not hasattr(type(pipe), "unstitched_class"):
        return pipe
    unet = stitched_unet(pipe)
    large = unet.large.to(unet.device)
    _exchange(pipe, large, type(pipe).unstitched_class)
    return pipe


def stitched_unet(pipe: DiffusionPipeline) -> StitchedUNet:
    """The StitchedUNet of a pipeline, also where it was compiled.

    Raises:
        InputError: if there is none.
    """
    unet = _uncompiled(pipe.unet)
    if not isinstance(unet, StitchedUNet):
        raise InputError("the pipeline's U-Net is not stitched; call stitch(pipe, small_unet) first")
    return unet


def _uncompiled(module: nn.Module) -> nn.Module:
    return module._orig_mod if is_compiled_module(module) else module


def _exchange(pipe: DiffusionPipeline, unet: nn.Module, cls: type[DiffusionPipeline]) -> None:
    offloaded = bool(getattr(pipe, "_all_hooks", None))  # enable_model_cpu_offload hangs on the modules
    if offloaded:
        pipe.remove_all_hooks()
    pipe.unet = unet
    pipe.__class__ = cls
    if offloaded:
        pipe.enable_model_cpu_offload(device=pipe._offload_device)


def check_fit(pipe: DiffusionPipeline, small: nn.Module, small_scheduler: SchedulerMixin | Mapping[str, Any] | None = None) -> None:
    """Hold a small U-Net to the one of a pipeline: the same latents, prompts and conditions, and, as far as schedulers tell, the same training.

    Raises:
        InputError: naming each setting that differs, and its two values.
    """
    large, names = pipe.unet, _SAME_CALL
    if getattr(pipe, "controlnet", None) is not None or getattr(pipe, "adapter", None) is not None:
        names += _SAME_RESIDUALS  # what a ControlNet adds has the large U-Net's shapes
    differing = _differences(names, large.config, small.config)
    if small_scheduler is not None:
        ours, its = pipe.scheduler.config, getattr(small_scheduler, "config", small_scheduler)
        differing += _differences([name for name in _SAME_TRAINING if None not in (ours.get(name), its.get(name))], ours, its)
    if differing:
        raise InputError(f"the small U-Net does not fit the large one: {'; '.join(differing)}; choose two that were trained for the same latents and prompts")


def _differences(names: Sequence[str], large: Mapping[str, Any], small: Mapping[str, Any]) -> list[str]:
    pairs = [(name, _plain(name, large.get(name)), _plain(name, small.get(name))) for name in names]
    return [f"{name} is {a} in the large one and {b} in the small one" for name, a, b in pairs if a != b]


def _plain(name: str, value: Any) -> Any:  # noqa: ANN401  (a config's value)
    """One number for a list of equal ones, as configs have both; the widths of the blocks stay a list."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if name != "block_out_channels" and len(set(value)) == 1 else list(value)


@functools.cache
def _stitched_class(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The subclass of a pipeline's class that takes `unet_s_ratio`; it has its name, so that what is saved loads as the class."""
    call, signature = cls.__call__, inspect.signature(cls.__call__)
    parameters = list(signature.parameters.values())
    swallows = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    known = {*signature.parameters, *_SWALLOWED}

    @functools.wraps(call)
    def stitched_call(self: DiffusionPipeline, *args: Any, unet_s_ratio: Ratio = 0.0, **kwargs: Any) -> Any:  # noqa: ANN401  (the pipeline's)
        unknown = [name for name in kwargs if name not in known]
        if swallows and unknown:
            raise TypeError(f"{cls.__name__}.__call__() got an unexpected keyword argument '{unknown[0]}'")
        unet = stitched_unet(self)
        with unet.routed(self, read_ratio(unet_s_ratio, len(unet.unets))):
            return call(self, *args, **kwargs)

    def save_pretrained(self: DiffusionPipeline, save_directory: Source, **kwargs: Any) -> None:  # noqa: ANN401
        """Write the pipeline as diffusers does, the small U-Nets in unet_small beside unet; diffusers loads it unstitched, `get_tstitch_pipepline` stitched."""
        self.register_to_config(unet=("diffusers", type(_uncompiled(stitched_unet(self).large)).__name__))
        cls.save_pretrained(self, save_directory, **kwargs)

    ratio = inspect.Parameter("unet_s_ratio", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=Ratio)
    stitched_call.__signature__ = signature.replace(parameters=[*parameters[: len(parameters) - swallows], ratio, *parameters[len(parameters) - swallows :]])
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "__call__": stitched_call, "save_pretrained": save_pretrained, "unstitched_class": cls})


def read_ratio(ratio: Ratio, num_unets: int) -> StitchSchedule:
    """What `unet_s_ratio` means: a number is the share of the first U-Net, the last takes the rest; a list has a share for each.

    Raises:
        TypeError: if it is neither a number, a list of numbers nor a schedule.
        InputError: if a share is outside [0, 1], they do not sum to 1, their number is not that of the U-Nets, or a schedule does not count steps.
    """
    if isinstance(ratio, StitchSchedule):
        if ratio.switch_by != "step":
            raise InputError(f"unet_s_ratio counts the steps of the call, not {ratio.switch_by}; pass a schedule with switch_by='step'")
        return ratio
    if isinstance(ratio, numbers.Real):
        StitchSchedule.from_ratio(ratio)  # its words for what is outside [0, 1]
        return StitchSchedule((ratio, *[0.0] * (num_unets - 2), 1 - ratio))
    if not isinstance(ratio, Sequence) or not all(isinstance(share, numbers.Real) for share in ratio):
        raise TypeError(f"unet_s_ratio is a number in [0, 1], a list of them or a StitchSchedule, got {ratio!r}")
    if len(ratio) != num_unets:
        raise InputError(f"unet_s_ratio has {len(ratio)} shares for {num_unets} U-Nets; pass one for each, the noisiest part first")
    return StitchSchedule(tuple(ratio))


def load_stitched(
    kind: type[DiffusionPipeline],
    large: Source,
    small: Source | Sequence[Source],
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
    cache_dir: Source | None = None,
    variant: str | None = None,
    offload: str = "none",
    vae: AutoencoderKL | Source | None = None,
    controlnet: ControlNetModel | Source | None = None,
    **parts: Any,  # noqa: ANN401  (components of the pipeline)
) -> DiffusionPipeline:
    """Load a pipeline and its small U-Nets, and stitch them.

    Args:
        kind: class of the pipeline.
        large: a hub name, or a folder in diffusers format.
        small: the same, or a folder of a U-Net alone; or several, the one for the noisiest steps first.
        device: auto (cuda, then mps, then cpu) or a torch device.
        dtype: number type of all weights; None: float16 on cuda, else float32.
        cache_dir: where hub downloads are kept; None: the hub's own place.
        variant: which of several weight files, e.g. "fp16", where a model has it; None: fp16 for float16.
        offload: "none"; "switch": one U-Net on the accelerator at a time; "model": and diffusers' enable_model_cpu_offload for everything else.
        vae: another autoencoder, or its hub name or folder.
        controlnet: a ControlNet, or its hub name or folder.
        parts: other arguments of the pipeline's class, e.g. safety_checker=None.

    Raises:
        TypeError: if the pipeline's class does not know one of `parts`.
        InputError: if the large model is of the other family, a model is neither here nor to be had from the hub, the U-Nets do not fit each other, or the
            device is not there.
    """
    unknown = [name for name in parts if name not in inspect.signature(kind.__init__).parameters]
    if unknown:  # from_pretrained would only warn
        raise TypeError(f"{kind.__name__} has no argument '{unknown[0]}'")
    if offload not in OFFLOADS:
        raise InputError(f"unknown offload '{offload}'; choose from {', '.join(OFFLOADS)}")
    _check_family(kind, large, cache_dir)
    device = parse_device(str(device))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    how = {"torch_dtype": dtype, "cache_dir": cache_dir, "variant": variant or ("fp16" if dtype == torch.float16 else None)}
    for name, cls, part in (("vae", AutoencoderKL, vae), ("controlnet", ControlNetModel, controlnet)):
        if part is not None:
            parts[name] = part if isinstance(part, nn.Module) else read_part(cls, part, **how)
    pipe = read_part(kind, large, **how, **parts)
    unets = []
    for source in [small] if isinstance(small, (str, Path)) else small:
        unets.append(read_part(UNet2DConditionModel, source, subfolder="unet", **how))
        check_fit(pipe, unets[-1], scheduler_config(source, cache_dir))
    stitch(pipe, unets, offload="none" if offload == "none" else "switch")
    if offload == "model" and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _check_family(kind: type[DiffusionPipeline], large: Source, cache_dir: Source | None) -> None:
    """Refuse SDXL where Stable Diffusion is read, and the other way round; what cannot be read is left to `read_part`."""
    try:
        with from_hub(large):
            found = kind.load_config(local_folder(large) or large, cache_dir=cache_dir)["_class_name"]
    except InputError:
        return
    is_sdxl = "XL" in found
    if is_sdxl != ("XL" in kind.__name__):
        script, loader = ("sdxl_demo", "get_tstitch_pipepline_sdxl") if is_sdxl else ("sd_demo", "get_tstitch_pipepline")
        raise InputError(f"{large} is a {found}, not a {kind.__name__}; use sd/{script}.py or {loader} for it")


def read_part(cls: type, source: Source, *, variant: str | None = None, subfolder: str | None = None, **how: Any) -> Any:  # noqa: ANN401  (a `cls`)
    """`cls.from_pretrained` for hub names and folders; a model that lacks the variant is read without."""
    folder = local_folder(source)
    index = None if folder is None else folder / "model_index.json"
    if issubclass(cls, DiffusionPipeline) and "vae" not in how and index and index.exists() and "vae" not in read_json(index):
        raise InputError(f"{source} has no autoencoder, which the emoji pair's trainer leaves out; load it in Python with vae=FOLDER, see sd/README.md")
    if folder is not None and subfolder is not None and not (folder / subfolder).is_dir():
        subfolder = None  # a model alone
    place = {"subfolder": subfolder} if subfolder else {}

    def read(variant: str | None) -> Any:  # noqa: ANN401  (a `cls`)
        with from_hub(source):
            return cls.from_pretrained(folder or source, variant=variant, **place, **how)

    if variant:
        with suppress(InputError):
            return read(variant)
    return read(None)


def local_folder(source: Source) -> Path | None:
    """The local folder that a source means, or None for a hub name.

    Raises:
        InputError: if it can only be a folder and is not there.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(source, Path) or folder.is_absolute() or source.startswith((".", "pretrained_models/")) or source.count("/") != 1:
        raise InputError(f"no folder {source}; pass a folder in diffusers format, or a hub name such as {SMALL_SD}")
    return None


def scheduler_config(source: Source, cache_dir: Source | None) -> Mapping[str, Any]:
    """How a small model was trained, as its scheduler says; nothing for a U-Net alone."""
    try:
        with from_hub(source):
            return LCMScheduler.load_config(local_folder(source) or source, subfolder="scheduler", cache_dir=cache_dir)
    except InputError:
        return {}


def _small_of(large: Source, published: str) -> list[Source]:
    """The small U-Nets that a stitched pipeline was saved with, else the published one."""
    return small_folders(Path(large).expanduser()) or [published]


def get_tstitch_pipepline(large_sd: Source = LARGE_SD, small_sd: Source | None = None, **how: Any) -> DiffusionPipeline:  # noqa: ANN401
    """Load a stitched Stable Diffusion pipeline; `how` are the keywords of `load_stitched`, which raises.

    Args:
        large_sd: the large model: a hub name, a folder in diffusers format, or "emoji" for the bundled pair.
        small_sd: the small model; None: the U-Nets that a stitched pipeline was saved with in `large_sd`, else the published one.
    """
    if str(large_sd) == "emoji":
        large_sd, how = EMOJI / "sd", {"vae": EMOJI / "vae"} | how
    checker = {"safety_checker": None, "requires_safety_checker": False}  # as published
    return load_stitched(StableDiffusionPipeline, large_sd, small_sd or _small_of(large_sd, SMALL_SD), **checker, **how)


def get_tstitch_pipepline_sdxl(large_sd: Source = LARGE_SDXL, small_sd: Source | None = None, **how: Any) -> DiffusionPipeline:  # noqa: ANN401
    """Load a stitched SDXL pipeline; arguments as of `get_tstitch_pipepline`."""
    return load_stitched(StableDiffusionXLPipeline, large_sd, small_sd or _small_of(large_sd, SMALL_SDXL), **how)


def get_tstitch_pipepline_sdxl_controlnet(
    large_sd: Source = LARGE_SDXL,
    small_sd: Source | None = None,
    *,
    controlnet: ControlNetModel | Source,
    **how: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Load a stitched SDXL pipeline with a ControlNet; arguments as of `get_tstitch_pipepline`."""
    small = small_sd or _small_of(large_sd, SMALL_SDXL)
    return load_stitched(StableDiffusionXLControlNetPipeline, large_sd, small, controlnet=controlnet, **how)


def get_tstitch_pipepline_sdxl_lcm_lora(
    large_sd: Source = LARGE_SDXL,
    small_sd: Source | None = None,
    *,
    large_lora: Source = LARGE_LCM_LORA,
    small_lora: Source = SMALL_LCM_LORA,
    **how: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Load a stitched SDXL pipeline for 2 to 8 steps: an LCM-LoRA merged into each U-Net, and the LCM scheduler; arguments as of `get_tstitch_pipepline`.

    Raises:
        InputError: besides, if a LoRA is not to be had or does not fit, there are several small U-Nets, or peft is not installed.
    """
    small = small_sd or _small_of(large_sd, SMALL_SDXL)
    if not isinstance(small, (str, Path)) and len(small) > 1:
        raise InputError(f"there are two LoRAs, for a small and a large U-Net, but {len(small)} small U-Nets; pass one")
    pipe = get_tstitch_pipepline_sdxl(large_sd, small, **how)
    unet = stitched_unet(pipe)
    for part, source in ((unet.unets[0], small_lora), (unet.large, large_lora)):
        load_lora(pipe, source, part, hub_file="pytorch_lora_weights.safetensors", cache_dir=how.get("cache_dir"))
        part.fuse_lora()
        part.unload_lora()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def load_lora(
    pipe: DiffusionPipeline, source: Source, unet: nn.Module | None = None, *, hub_file: str | None = None, cache_dir: Source | None = None
) -> None:  # fmt: skip
    """Put a LoRA into one U-Net of a stitched pipeline; where none is named, into the large one and the text encoders.

    Args:
        source: a file, a folder or a hub name.
        hub_file: its file on the hub; None: the hub is asked.

    Raises:
        InputError: if it is not to be had, does not fit the U-Net or has nothing for it, or peft is not installed.
    """
    file = Path(source).expanduser()
    place, name = (file.parent, file.name) if file.is_file() else (file, None) if file.is_dir() else (source, hub_file)

    def load() -> None:
        if unet is None:
            pipe.load_lora_weights(str(place), weight_name=name, adapter_name=ADAPTER, cache_dir=cache_dir)
        else:
            weights, alphas = pipe.lora_state_dict(str(place), weight_name=name, unet_config=unet.config, cache_dir=cache_dir)
            pipe.load_lora_into_unet(weights, network_alphas=alphas, unet=unet, adapter_name=ADAPTER)

    load_part("LoRA", source, load)
    if ADAPTER not in getattr(unet or stitched_unet(pipe).large, "peft_config", {}):  # diffusers only warns
        raise InputError(f"the LoRA {source} has no weights for a U-Net; choose one that was trained for this model's")


def load_part(what: str, source: Source, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (a model)
    """Call a library's `load` for what comes beside the two models, e.g. a LoRA.

    Raises:
        InputError: if it is neither here nor to be had from the hub, or does not fit.
    """
    with from_hub(source, f"the {what}", "its folder"):
        return load(*args, **kwargs)


# The same names, spelled correctly.
get_tstitch_pipeline = get_tstitch_pipepline
get_tstitch_pipeline_sdxl = get_tstitch_pipepline_sdxl
get_tstitch_pipeline_sdxl_lcm_lora = get_tstitch_pipepline_sdxl_lcm_lora
get_tstitch_pipeline_sdxl_controlnet = get_tstitch_pipepline_sdxl_controlnet
