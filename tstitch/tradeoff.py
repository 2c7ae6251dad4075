"""Schedules side by side: the same noise along each, the seconds each takes here, its quality where that is known; as pictures, a table and JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import file_hash
from tstitch.cli import SamplingPlan
from tstitch.files import write_json
from tstitch.guidance import Denoiser
from tstitch.noise import SampleNoise
from tstitch.plots import contact_sheet, image_grid, plot_tradeoff, save_image
from tstitch.presets import DenoiserFile
from tstitch.results import markdown_table, quality_by_schedule
from tstitch.schedule import StitchSchedule, steps_by_denoiser
from tstitch.sweep import count_evaluations, sample_many
from tstitch.tune import measure_step_seconds, predict_seconds


@dataclass(frozen=True)
class Row:
    """One schedule. The speed-up is against the last denoiser alone, decoding included; fd_emoji is None where it was not measured so."""

    schedule: str
    name: str
    title: str
    steps: list[int]
    seconds_per_image: float
    speed_up: float
    fd_emoji: float | None


@dataclass(frozen=True)
class Comparison:
    """Schedules compared: their rows, and pictures uint8 (N, schedules, 3, H, W)."""

    rows: list[Row]
    images: Tensor
    record: dict[str, Any]  # everything that makes the figures comparable


def compare(
    plan: SamplingPlan, denoisers: Sequence[Denoiser], files: Sequence[DenoiserFile], schedules: list[StitchSchedule], autoencoder: Autoencoder
) -> Comparison:
    """Sample every schedule as one tree, and time its parts.

    The seconds of a schedule are those it would take alone: steps times the step times of its denoisers, measured here at the same batch, plus decoding.
    """
    x_T, y = plan.noise.latents(autoencoder.latent_shape(plan.image_size), plan.device), plan.labels.to(plan.device)
    n = min(len(y), plan.max_batch)
    measured = measure_step_seconds(denoisers, x_T[:n], y[:n], solver=plan.solver, guidance=plan.guidance, noise=SampleNoise(plan.noise.seeds[:n]))
    step_seconds = [seconds * len(y) / n for seconds in measured]
    latents = _sample(plan, denoisers, x_T, y, schedules, step_seconds)
    images, decode_seconds = _decode(autoencoder, latents)

    letters = [file.letter for file in files]
    weights = {file.letter: file_hash(file.path) for file in files}
    if autoencoder.weights.exists():
        weights["vae"] = file_hash(autoencoder.weights)
    quality = quality_by_schedule(plan.preset.results, plan.settings, weights)
    alone = plan.solver.num_steps * step_seconds[-1] + decode_seconds
    rows = []
    for schedule in schedules:
        seconds = predict_seconds(schedule, plan.solver, step_seconds) + decode_seconds
        rows.append(
            Row(
                schedule=schedule.to_json(),
                name=schedule.describe(letters),
                title=f"ratio {schedule.fractions[0]:g}" if len(letters) == 2 else schedule.describe(letters),
                steps=steps_by_denoiser(schedule.legs(plan.solver.num_steps, timesteps=plan.solver.timesteps), len(letters)),
                seconds_per_image=seconds / len(y),
                speed_up=alone / seconds,
                fd_emoji=quality.get(schedule.describe(letters)),
            )
        )
    record = {
        "settings": plan.settings,
        "seeds": plan.noise.seeds,
        "labels": plan.labels.tolist(),
        "models": {file.letter: file.model for file in files},
        "weights": weights,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step_seconds": dict(zip(letters, step_seconds, strict=True)),
        "decode_seconds": decode_seconds,
    }
    return Comparison(rows, images, record)


def _sample(
    plan: SamplingPlan, denoisers: Sequence[Denoiser], x_T: Tensor, y: Tensor, schedules: list[StitchSchedule], step_seconds: list[float]
) -> list[Tensor]:
    """Latents (N, C, h, w) of each schedule; the bar counts seconds of work, so that its ETA knows which steps are dear."""
    work = sum(n * s for n, s in zip(count_evaluations(schedules, plan.solver, len(denoisers)), step_seconds, strict=True))
    with tqdm(total=work, desc="sampling", bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} s of work [{elapsed}<{remaining}]") as bar:
        return sample_many(
            denoisers,
            x_T,
            y,
            schedules=schedules,
            solver=plan.solver,
            guidance=plan.guidance,
            noise=plan.noise,
            max_batch=plan.max_batch,
            callback=lambda progress: bar.update(step_seconds[progress.denoiser] * len(progress.x) / len(y)),
        )


def _decode(autoencoder: Autoencoder, latents: list[Tensor]) -> tuple[Tensor, float]:
    """Pictures uint8 (N, schedules, 3, H, W), and seconds to decode one schedule's."""
    autoencoder.decode(latents[0][:1])  # the first call prepares kernels
    start = time.perf_counter()
    images = torch.stack([autoencoder.decode(x) for x in tqdm(latents, desc="decoding", unit="schedule")], dim=1)
    return images, (time.perf_counter() - start) / len(latents)


def table(comparison: Comparison) -> str:
    """Schedule, steps of each model, seconds per image, speed-up and quality, as Markdown."""
    cells = [
        [
            row.title,
            "/".join(map(str, row.steps)),
            f"{row.seconds_per_image:.3f}",
            f"{row.speed_up:.2f}",
            "-" if row.fd_emoji is None else f"{row.fd_emoji:.2f}",
        ]
        for row in comparison.rows
    ]
    return markdown_table(["schedule", f"steps {'/'.join(comparison.record['models'])}", "seconds per image", "speed-up", "FD-emoji"], cells)


def save(folder: Path, plan: SamplingPlan, comparison: Comparison) -> None:
    """Write grid.png, results.json, and tradeoff.png where the quality of several schedules is known."""
    rows, images = comparison.rows, comparison.images
    (folder / "tradeoff.png").unlink(missing_ok=True)  # one of an earlier run would not belong to this grid
    if len(rows) == 1:
        grid = contact_sheet(images[:, 0], f"{rows[0].title}, {rows[0].seconds_per_image:.2f} s per image")
    else:
        names = [plan.preset.class_name(label) for label in plan.labels.tolist()]
        grid = image_grid(images, [f"{row.title}\n{row.seconds_per_image:.2f} s" for row in rows], names)
    save_image(folder / "grid.png", grid)
    if len(rows) > 1 and all(row.fd_emoji is not None for row in rows):
        plot_tradeoff(
            folder / "tradeoff.png",
            {"schedules": [(row.seconds_per_image, row.fd_emoji, row.title) for row in rows]},
            xlabel="seconds per image on this machine",
            ylabel="FD-emoji (comparable only with itself)",
            title=f"{' + '.join(comparison.record['models'].values())}, {plan.solver.num_steps} steps",
        )
    write_json(folder / "results.json", comparison.record | {"rows": [asdict(row) for row in rows]})
