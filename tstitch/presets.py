"""Named model sets: which files are the small, the base and the large denoiser, and how their samples are usually made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    denoisers: tuple[DenoiserFile, DenoiserFile, DenoiserFile]
    vae: str
    downsampling: int = 8  # pixels per latent
    labels: tuple[int, ...] = (207, 360, 387, 974, 88, 979, 417, 279)  # what the DiT demos show
    class_names: tuple[str, ...] = ()
    num_sampling_steps: int = 50
    cfg_scale: float = 4.0
    cfg_channels: int | None = 3  # 3 of the 4 latent channels, as the published samples were made
    results: Path | None = None  # measured quality by schedule, where there is one

    def class_name(self, label: int) -> str:
        """Name of a class, or its number."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


def _imagenet(size: int) -> Preset:
    folder = ROOT / "pretrained_models"
    files = tuple(DenoiserFile(a, f"DiT-{a}/2", folder / f"dit_{a.lower()}_{size}.pt") for a in ("S", "B", "XL"))
    return Preset(f"imagenet{size}", size, 1000, files, vae="stabilityai/sd-vae-ft-mse")


_EMOJI = ROOT / "pretrained_models" / "emoji"
_EMOJI_FILES = tuple(
    DenoiserFile(letter, f"emoji-{size}", _EMOJI / f"dit-{size}.safetensors") for letter, size in (("S", "small"), ("B", "base"), ("L", "large"))
)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="emoji",
            image_size=64,
            num_classes=len(EMOJI_CLASSES),
            denoisers=_EMOJI_FILES,
            vae=str(_EMOJI / "vae"),
            downsampling=4,
            labels=(0, 1, 2, 3, 4, 6, 7, 8),
            class_names=EMOJI_CLASSES,
            num_sampling_steps=20,
            cfg_scale=2.0,
            cfg_channels=None,
            results=_EMOJI / "dit_results.json",
        ),
        _imagenet(256),
        _imagenet(512),
    )
}


def get_preset(name: str) -> Preset:
    """Look a preset up.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset '{name}'; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
