"""Schedules side by side: the same noise along each, the seconds each takes here, its quality where that is known; as pictures, a table and JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstitch.autoencoder import Autoencoder
from tstitch.cli import SamplingPlan
from tstitch.dry_run import Files, picture_bytes, plan_sampling
from tstitch.files import write_json
from tstitch.guidance import Denoiser, SizedDenoiser
from tstitch.noise import SampleNoise
from tstitch.plots import contact_sheet, image_grid, plot_tradeoff, save_image
from tstitch.presets import DenoiserFile
from tstitch.results import markdown_table, quality_by_schedule, run_record
from tstitch.schedule import StitchSchedule
from tstitch.sweep import UNMEASURED
from tstitch.walker import Walked, total_seconds

MEASURED_REPEATS = 7


@dataclass(frozen=True)
class Row:
    """One schedule.

    Guided evaluations a picture, by denoiser; the speed-up against the last denoiser alone, decoding included; fd_emoji where it was measured so.
    """

    schedule: str
    name: str
    title: str
    evaluations: Sequence[float]
    seconds_per_image: float
    speed_up: float | None
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

    The seconds of a schedule are those it would take alone: evaluations times the seconds of one of its denoisers, measured here at the same batch, plus
    decoding.
    """
    x_T, y = plan.noise.latents(autoencoder.latent_shape(plan.image_size), plan.device), plan.labels.to(plan.device)
    seconds_each = evaluation_seconds(plan, denoisers, x_T, y)
    walked = _walk(plan, denoisers, x_T, y, schedules, seconds_each)
    images, decode_seconds = _decode(autoencoder, walked.latents)

    letters = [file.letter for file in files]
    record = run_record(plan, files) | {"max_batch": walked.max_batch or plan.max_batch}
    source, quality = quality_by_schedule(plan.preset.results, plan.settings, record["weights"])
    totals = [total_seconds(evaluations, seconds_each) + decode_seconds for evaluations in walked.evaluations]
    alone = _large_alone(plan, schedules, walked, len(denoisers))
    alone_seconds = None if alone is None else total_seconds(alone, seconds_each) + decode_seconds
    rows = [
        Row(
            schedule=schedule.to_json(),
            name=schedule.describe(letters),
            title=f"ratio {schedule.fractions[0]:g}" if len(letters) == 2 else schedule.describe(letters),
            evaluations=evaluations,
            seconds_per_image=seconds / len(y),
            speed_up=None if alone_seconds is None else alone_seconds / seconds,
            fd_emoji=quality.get(schedule.describe(letters)),
        )
        for schedule, evaluations, seconds in zip(schedules, walked.evaluations, totals, strict=True)
    ]
    record |= {"step_seconds": dict(zip(letters, seconds_each, strict=True)), "decode_seconds": decode_seconds, "quality_from": source and source.name}
    return Comparison(rows, images, record)


def evaluation_seconds(plan: SamplingPlan, denoisers: Sequence[Denoiser], x: Tensor, y: Tensor) -> list[float]:
    """Seconds that one guided evaluation of each denoiser takes for the batch x (N, C, H, W), y (N,), in calls of at most --max-batch."""
    n, noise = _measured(plan), SampleNoise(plan.noise.seeds[: _measured(plan)])
    measured = plan.walker.evaluation_seconds(denoisers, x[:n], y[:n], guidance=plan.guidance, noise=noise, repeats=MEASURED_REPEATS)
    return [seconds * len(y) / n for seconds in measured]


def _measured(plan: SamplingPlan) -> int:
    """Pictures of a call that is timed."""
    return min(len(plan.labels), plan.max_batch or UNMEASURED)


def compare_and_save(
    folder: Path, plan: SamplingPlan, denoisers: Sequence[SizedDenoiser], files: Sequence[DenoiserFile], schedules: list[StitchSchedule]
) -> None:
    """What a stitching script does once its models are loaded: `compare`, print the table, write the pictures and the results.

    Raises:
        InputError: if a denoiser and the plan's autoencoder do not fit together.
    """
    autoencoder = Autoencoder(plan.vae, plan.device)
    for denoiser in denoisers:
        autoencoder.check_fit(denoiser.latent_shape, plan.image_size)
    if plan.dry_run:
        pictures = picture_bytes(plan, len(schedules))
        output = [Files("grid.png, results.json and perhaps tradeoff.png", 2 * pictures, folder, at_most=True)]
        measured = (MEASURED_REPEATS + 1) * _measured(plan)
        plan_sampling(plan, denoisers, files, schedules, autoencoder, output, measured=measured, prepared=1, kept=2 * pictures)
        return
    if files[-1] not in plan.preset.denoisers:  # one's own large model has classes of its own: rows get their numbers
        plan = replace(plan, preset=replace(plan.preset, class_names=()))
    comparison = compare(plan, denoisers, files, schedules, autoencoder)
    report(comparison)
    save(folder, plan, comparison)
    print(f"wrote {folder}")


def _large_alone(plan: SamplingPlan, schedules: Sequence[StitchSchedule], walked: Walked, num_denoisers: int) -> Sequence[float] | None:
    """Evaluations of the last denoiser alone; None where only a walk would tell, and it was not among the schedules."""
    alone = StitchSchedule((1.0,), order=(num_denoisers - 1,))
    known = plan.walker.work([alone], num_denoisers)
    if known is not None:
        return known
    own = [k for k, schedule in enumerate(schedules) if math.fsum(schedule.fractions[:-1]) == 0]
    return walked.evaluations[own[0]] if own else None


def _walk(plan: SamplingPlan, denoisers: Sequence[Denoiser], x_T: Tensor, y: Tensor, schedules: list[StitchSchedule], seconds_each: list[float]) -> Walked:
    """Walk all schedules; the bar counts seconds of work, so that its ETA knows which evaluations are dear."""
    work = plan.walker.work(schedules, len(denoisers))
    if work is None:  # an adaptive method finds its steps as it goes
        bar = tqdm(desc="sampling", bar_format="{desc}: {n:.1f} s of work [{elapsed}]")
    else:
        bar = tqdm(desc="sampling", total=total_seconds(work, seconds_each), bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} s of work [{elapsed}<{remaining}]")
    with bar:
        return plan.walker.walk(
            denoisers, x_T, y, schedules=schedules, guidance=plan.guidance, noise=plan.noise, max_batch=plan.max_batch,
            callback=lambda denoiser, evaluations: bar.update(seconds_each[denoiser] * evaluations),
        )  # fmt: skip


def _decode(autoencoder: Autoencoder, latents: list[Tensor]) -> tuple[Tensor, float]:
    """Pictures uint8 (N, schedules, 3, H, W), and seconds to decode one schedule's."""
    autoencoder.decode(latents[0][:1])  # the first call prepares kernels
    start = time.perf_counter()
    images = torch.stack([autoencoder.decode(x) for x in tqdm(latents, desc="decoding", unit="schedule")], dim=1)
    return images, (time.perf_counter() - start) / len(latents)


def table(comparison: Comparison) -> str:
    """Schedule, evaluations of each model, seconds per image, speed-up and quality, as Markdown."""
    cells = [
        [
            row.title,
            "/".join(f"{n:.4g}" for n in row.evaluations),
            f"{row.seconds_per_image:.3f}",
            "-" if row.speed_up is None else f"{row.speed_up:.2f}",
            "-" if row.fd_emoji is None else f"{row.fd_emoji:.2f}",
        ]
        for row in comparison.rows
    ]
    return markdown_table(["schedule", f"evaluations {'/'.join(comparison.record['models'])}", "seconds per image", "speed-up", "FD-emoji"], cells)


def report(comparison: Comparison) -> None:
    """Print the table, and say where its quality comes from."""
    print(table(comparison))
    if any(row.fd_emoji is not None for row in comparison.rows):
        print(f"FD-emoji was measured before, over more pictures and perhaps in another number type: {comparison.record['quality_from']}")


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
    points = [(row.seconds_per_image, row.fd_emoji, row.title) for row in rows if row.fd_emoji is not None]
    if len(rows) > 1 and len(points) == len(rows):
        plot_tradeoff(
            folder / "tradeoff.png",
            {"schedules": points},
            xlabel="seconds per image on this machine",
            ylabel="FD-emoji (comparable only with itself)",
            title=f"{' + '.join(comparison.record['models'].values())}, {plan.walker.describe()}",
        )
    write_json(folder / "results.json", comparison.record | {"rows": [asdict(row) for row in rows]})
