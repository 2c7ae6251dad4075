"""Pictures of results: image grids with headers, and the trade-off curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tstitch.files import atomic_path

MARGIN = 4


def _font(size: int) -> ImageFont.FreeTypeFont:
    # The one font that is always there, since matplotlib ships it.
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def save_image(path: Path, image: Image.Image) -> None:
    """Save a picture atomically, format by suffix."""
    with atomic_path(path) as temporary:
        image.save(temporary)


def image_grid(images: Tensor, columns: Sequence[str], rows: Sequence[str] = (), cell: int = 96) -> Image.Image:
    """Lay out pictures under column headers and beside row names.

    Args:
        images: uint8 (rows, columns, 3, H, W).
        columns: header of each column; a line break makes a second line.
        rows: name of each row; () leaves the names out.
        cell: side of a picture in the grid in pixels, at least; small ones are enlarged by a whole factor.
    """
    size = images.shape[-1]
    cell = size * max(1, cell // size)
    font = _font(13)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = MARGIN * 3 + max((round(draw.textlength(name, font)) for name in rows), default=-MARGIN * 2)
    top = MARGIN * 2 + 16 * max((header.count("\n") + 1 for header in columns if header), default=0)
    grid = Image.new("RGB", (left + len(columns) * (cell + MARGIN), top + len(images) * (cell + MARGIN)), "white")
    draw = ImageDraw.Draw(grid)
    for c, header in enumerate(columns):
        width = max(draw.textlength(line, font) for line in header.split("\n"))
        # Centred over its column, or flush left where it is wider.
        centre = left + c * (cell + MARGIN) + max(cell, width) / 2
        draw.multiline_text((centre, MARGIN), header, "black", font, anchor="ma", align="center", spacing=2)
    for r, row in enumerate(images):
        if rows:
            draw.text((left - 2 * MARGIN, top + r * (cell + MARGIN) + cell / 2), rows[r], "black", font, anchor="rm")
        for c, picture in enumerate(row):
            tile = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).resize((cell, cell), Image.Resampling.NEAREST)
            grid.paste(tile, (left + c * (cell + MARGIN), top + r * (cell + MARGIN)))
    return grid


def contact_sheet(images: Tensor, header: str = "", columns: int = 4) -> Image.Image:
    """Lay out pictures uint8 (N, 3, H, W) row by row, under one header."""
    columns = min(columns, len(images))
    blank = torch.full_like(images[:1], 255).expand(-len(images) % columns, -1, -1, -1)
    return image_grid(torch.cat([images, blank]).unflatten(0, (-1, columns)), [header, *[""] * (columns - 1)])


def plot_tradeoff(
    path: Path, curves: dict[str, list[tuple[float, float, str]]], *, xlabel: str, ylabel: str, title: str = "", lines: Sequence[str] | None = None
) -> None:
    """Draw quality against cost.

    Args:
        curves: name -> points (cost, quality, short label).
        lines: names whose points are joined by a line; None joins all.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        joined = lines is None or name in lines
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-" if joined else "D", label=name, markersize=5, linewidth=1.5)
        for cost, quality, label in points:
            axes.annotate(label, (cost, quality), textcoords="offset points", xytext=(4, 5 if joined else -11), fontsize=7)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.set_xlim(0, 1.1 * max(p[0] for points in curves.values() for p in points))  # room for the last label
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    _save_figure(path, figure)


def plot_spectra(path: Path, powers: Tensor, timesteps: Sequence[int], *, ylabel: str, title: str = "") -> None:
    """Draw radial power by step, dark for the first steps and bright for the last.

    Args:
        powers: (steps, R), at 0, 1, 2, ... cycles per picture.
        timesteps: training timestep of each step, noisiest first.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(timesteps[-1], timesteps[0]), "plasma_r")
    for power, t in zip(powers.tolist(), timesteps, strict=True):
        axes.semilogy(power, color=scale.to_rgba(np.asarray(t)), linewidth=1.5)
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="white noise of unit variance")
    axes.set(xlabel="spatial frequency, cycles per width of the latents", ylabel=ylabel, title=title)
    axes.set_xlim(0, powers.shape[1] - 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.colorbar(scale, ax=axes, label="timestep of the step (1000: all noise)")
    _save_figure(path, figure)


def plot_bands(path: Path, curves: dict[str, tuple[Tensor, Tensor]], *, xlabel: str, ylabel: str, title: str = "") -> None:
    """Draw means with their spread as a band: name -> (mean, spread), each (N,), at 1, 2, ..., N."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (mean, spread) in curves.items():
        steps = range(1, len(mean) + 1)
        (line,) = axes.plot(steps, mean, "o-", label=name, markersize=3, linewidth=1.5)
        axes.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    _save_figure(path, figure)


def plot_curves(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], *, xlabel: str, log: bool = True) -> None:
    """Draw curves in panels side by side: quantity -> name -> points (x, y)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 3.8), layout="constrained", squeeze=False)
    for panel, (quantity, curves) in zip(axes[0], panels.items(), strict=True):
        for name, points in curves.items():
            panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="o" if len(points) < 30 else "", markersize=4)
        panel.set(xlabel=xlabel, ylabel=quantity, yscale="log" if log else "linear")
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    _save_figure(path, figure)


def _save_figure(path: Path, figure: plt.Figure) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
