"""Named model sets, and named recipes: which files are the small, the base and the large denoiser, and how published numbers were made with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tstitch.errors import InputError

# Paths below are relative to the repository, so that scripts run from any folder.
ROOT = Path(__file__).resolve().parents[1]

EMOJI_CLASSES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)


@dataclass(frozen=True)
class DenoiserFile:
    """One denoiser: the letter it is shown by, its model name, its weights."""

    letter: str
    model: str
    path: Path


@dataclass(frozen=True)
class Preset:
    """A set of denoisers that share latents and labels, small to large."""

    name: str
    image_size: int
    num_classes: int
    denoisers: tuple[DenoiserFile, ...]
    vae: str
    downsampling: int = 8  # pixels per latent
    labels: tuple[int, ...] = (207, 360, 387, 974, 88, 979, 417, 279)  # what the DiT demos show
    class_names: tuple[str, ...] = ()
    num_sampling_steps: int = 50
    cfg_scale: float = 4.0
    cfg_channels: int | None = 3  # 3 of the 4 latent channels, as the published samples were made
    results: tuple[Path, ...] = ()  # measured quality by schedule, a file for each way to sample
    for_fid: Mapping[str, Any] = field(default_factory=dict)  # values that the published samples for FID were made with, where the demos have others
    config: Path | None = None  # yaml that says what the models are, where their files do not

    def class_name(self, label: int) -> str:
        """Name of a class, or its number."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


def _imagenet(backbone: str, size: int, **values: Any) -> Preset:  # noqa: ANN401  (fields of Preset)
    folder = ROOT / "pretrained_models"
    files = tuple(DenoiserFile(a, f"{backbone}-{a}/2", folder / f"{backbone.lower()}_{a.lower()}_{size}.pt") for a in ("S", "B", "XL"))
    return Preset(f"imagenet{size}", size, 1000, files, vae="stabilityai/sd-vae-ft-mse", **values)


def _emoji(backbone: str, sizes: tuple[str, ...], results: tuple[str, ...], **values: Any) -> Preset:  # noqa: ANN401  (fields of Preset)
    folder = ROOT / "pretrained_models" / "emoji"
    return Preset(
        name="emoji",
        image_size=64,
        num_classes=len(EMOJI_CLASSES),
        denoisers=tuple(DenoiserFile(size[0].upper(), f"emoji-{size}", folder / f"{backbone}-{size}.safetensors") for size in sizes),
        vae=str(folder / "vae"),
        downsampling=4,
        labels=(0, 1, 2, 3, 4, 6, 7, 8),
        class_names=EMOJI_CLASSES,
        cfg_scale=2.0,
        cfg_channels=None,
        results=tuple(folder / f"{name}.json" for name in results),
        **values,
    )


_DIT_FID = {"num_sampling_steps": 250, "cfg_scale": 1.5, "vae": "stabilityai/sd-vae-ft-ema"}
_SIT_FID = {"cfg_scale": 1.0, "vae": "stabilityai/sd-vae-ft-ema"}

PRESETS = {
    preset.name: preset
    for preset in (
        _emoji("dit", ("small", "base", "large"), ("dit_results",), num_sampling_steps=20),
        _imagenet("DiT", 256, for_fid=_DIT_FID),
        _imagenet("DiT", 512, for_fid=_DIT_FID),
    )
}
SIT_PRESETS = {
    preset.name: preset
    for preset in (
        _emoji("sit", ("small", "large"), ("sit_results_ode", "sit_results_sde"), num_sampling_steps=21),  # 20 steps, as the DiTs take
        _imagenet("SiT", 256, num_sampling_steps=250, for_fid=_SIT_FID),
        _imagenet("SiT", 512, num_sampling_steps=250, for_fid=_SIT_FID),
    )
}
_LDM = ROOT / "pretrained_models"
LDM_PRESETS = {
    preset.name: preset
    for preset in (
        _emoji("ldm", ("small", "large"), ("ldm_results",), num_sampling_steps=20),
        Preset(
            "imagenet256", 256, 1000, (DenoiserFile("S", "LDM-S", _LDM / "ldm_s.ckpt"), DenoiserFile("L", "LDM", _LDM / "ldm.ckpt")),
            vae=str(_LDM / "vq-f8" / "model.ckpt"), labels=(25, 187, 448, 992), num_sampling_steps=100, cfg_scale=3.0, cfg_channels=None,
            for_fid={"num_sampling_steps": 200}, config=ROOT / "ldm" / "configs" / "cin-ldm-vq-f8-t-stitch.yaml",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Metrics:
    """Published quality, as the evaluator of ADM measures it; None where it was not published."""

    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items() if value is not None)


@dataclass(frozen=True)
class Recipe:
    """How a published number was made: one model, its sampler, its pictures, what they were compared with, and what came out."""

    name: str
    preset: str
    model: str
    solver: str
    num_sampling_steps: int
    cfg_scale: float
    num_images: int
    reference: str  # ADM's reference batch
    published: Metrics
    source: str
    cfg_channels: int | None = 3
    vae: str = "stabilityai/sd-vae-ft-ema"

    def fill(self, preset: Preset) -> Preset:
        """The preset with the recipe's values for its defaults.

        Raises:
            InputError: if it is another preset than the recipe's.
        """
        if preset.name != self.preset:
            raise InputError(f"recipe {self.name} belongs to preset {self.preset}, not {preset.name}; leave --preset out")
        return replace(preset, num_sampling_steps=self.num_sampling_steps, cfg_scale=self.cfg_scale, cfg_channels=self.cfg_channels, vae=self.vae)


def _dit_paper(size: int, cfg_scale: float, *metrics: float) -> Recipe:
    resolution = "" if size == 256 else f"-{size}"
    return Recipe(
        name=f"dit-xl-2{resolution}-cfg{cfg_scale:g}",
        preset=f"imagenet{size}",
        model="DiT-XL/2",
        solver="ddpm",
        num_sampling_steps=250,
        cfg_scale=cfg_scale,
        num_images=50_000,
        reference="VIRTUAL_imagenet256_labeled.npz" if size == 256 else "VIRTUAL_imagenet512.npz",
        published=Metrics(*metrics),
        source=f"Peebles and Xie 2022, arXiv:2212.09748, Table {2 if size == 256 else 3}",
    )


def _t_stitch(letter: str, fid: float) -> Recipe:
    return Recipe(
        name=f"t-stitch-dit-{letter.lower()}",
        preset="imagenet256",
        model=f"DiT-{letter}/2",
        solver="ddim",
        num_sampling_steps=100,
        cfg_scale=1.5,
        num_images=5_000,
        reference="VIRTUAL_imagenet256_labeled.npz",
        published=Metrics(fid),
        source="Pan et al. 2024, arXiv:2402.14167, and NVlabs/T-Stitch, dit/README.md",
    )


# An FID of 5,000 pictures and one of 50,000 are not comparable.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        _dit_paper(256, 1.5, 2.27, 4.60, 278.24, 0.83, 0.57),
        _dit_paper(256, 1.25, 3.22, 5.28, 201.77, 0.76, 0.62),
        _dit_paper(256, 1.0, 9.62, 6.85, 121.50, 0.67, 0.67),
        _dit_paper(512, 1.5, 3.04, 5.02, 240.82, 0.84, 0.54),
        _dit_paper(512, 1.25, 4.64, 5.77, 174.77, 0.81, 0.57),
        _dit_paper(512, 1.0, 12.03, 7.12, 105.25, 0.75, 0.64),
        _t_stitch("S", 33.46),
        _t_stitch("B", 12.30),
        _t_stitch("XL", 9.2),
    )
}


def get_recipe(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe '{name}'; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def get_preset(name: str, presets: Mapping[str, Preset] = PRESETS) -> Preset:
    """Look a preset of a backbone up.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in presets:
        raise InputError(f"unknown preset '{name}'; choose from {', '.join(presets)}")
    return presets[name]
