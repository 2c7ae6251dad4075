"""Sample with a small DiT that hands over to a large one, at one ratio or at all of them.

    python dit/sample_t_stitch.py --preset emoji --all_tradeoffs            # 11 ratios of the bundled small and large model
    python dit/sample_t_stitch.py --preset emoji --three_combo 0.4 0.2 0.4  # small 40 %, base 20 %, large 40 % of the steps
    python dit/sample_t_stitch.py --ratio 0.4 --s_ckpt dit_s.pt --xl_ckpt DiT-XL-2-256x256.pt

Writes grid.png (rows labels, columns schedules), results.json and, where the quality is known, tradeoff.png. All schedules start from the same noise. The
seconds are those of each schedule alone: steps times the step times of the denoisers, measured here, plus decoding.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from dit.models import DiT
from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import file_hash
from tstitch.cli import SamplingPlan, add_sampling_args, new_parser, run, sampling_plan
from tstitch.files import check_folder, write_json
from tstitch.noise import SampleNoise
from tstitch.plots import contact_sheet, image_grid, plot_tradeoff, save_image
from tstitch.presets import DenoiserFile
from tstitch.results import markdown_table, quality_by_schedule
from tstitch.schedule import RULES, StitchSchedule, steps_by_denoiser, two_way_ratios
from tstitch.sweep import count_evaluations, sample_many
from tstitch.tune import measure_step_seconds, predict_seconds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    stitch = parser.add_argument_group("stitching").add_mutually_exclusive_group()
    stitch.add_argument("--ratio", type=float, default=0.5, help="the small model's share of the steps, 0..1")
    stitch.add_argument("--all_tradeoffs", action="store_true", help="ratios 0.0, 0.1, ..., 1.0")
    stitch.add_argument("--three_combo", type=float, nargs=3, metavar=("SMALL", "BASE", "LARGE"), help="shares of three models, sum 1")
    parser.add_argument("--switch-by", choices=RULES[:2], default="step", help="share of the steps, or of the training timesteps (the published DiT rule)")
    for flag, size in (("s", "small"), ("b", "base"), ("xl", "large")):
        parser.add_argument(f"--{flag}_ckpt", type=Path, help=f"weights of the {size} model (default: the preset's)")
    parser.add_argument("--save_dir", type=Path, help="folder to write (default: figures/seed_SEED)")
    add_sampling_args(parser)
    return parser.parse_args(argv)


def choose_schedules(args: argparse.Namespace) -> list[StitchSchedule]:
    """Schedules that the command line asks for."""
    if args.three_combo:
        return [StitchSchedule(args.three_combo, switch_by=args.switch_by)]
    if args.all_tradeoffs:
        return [replace(schedule, switch_by=args.switch_by) for schedule in two_way_ratios()]
    return [StitchSchedule.from_ratio(args.ratio, switch_by=args.switch_by)]


def choose_files(args: argparse.Namespace, plan: SamplingPlan) -> list[DenoiserFile]:
    """Small and large, or all three, with the paths of the command line in place of the preset's."""
    given = (args.s_ckpt, args.b_ckpt, args.xl_ckpt)
    files = [replace(file, path=path) if path else file for file, path in zip(plan.preset.denoisers, given, strict=True)]
    return files if args.three_combo else [files[0], files[2]]


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    schedules = choose_schedules(args)
    plan = sampling_plan(args)
    files = choose_files(args, plan)
    folder = args.save_dir or Path("figures") / f"seed_{args.seed}"
    check_folder(folder)
    denoisers = load_denoisers(plan, files)
    autoencoder = Autoencoder(plan.vae, plan.device)
    autoencoder.check_fit(denoisers[0].latent_shape, plan.image_size)
    x_T, y = plan.noise.latents(denoisers[0].latent_shape, plan.device), plan.labels.to(plan.device)

    n = min(len(y), args.max_batch)
    measured = measure_step_seconds(denoisers, x_T[:n], y[:n], solver=plan.solver, guidance=plan.guidance, noise=SampleNoise(plan.noise.seeds[:n]))
    step_seconds = [seconds * len(y) / n for seconds in measured]
    latents = sample_with_progress(args, plan, denoisers, x_T, y, schedules, step_seconds)
    images, decode_seconds = decode(autoencoder, latents)

    weights = {file.letter: file_hash(file.path) for file in files}
    if autoencoder.weights.exists():
        weights["vae"] = file_hash(autoencoder.weights)
    rows = make_rows(plan, schedules, [file.letter for file in files], step_seconds, decode_seconds, weights)
    print_table(rows, files)
    save(folder, plan, rows, images, files)
    write_json(
        folder / "results.json",
        {
            "settings": plan.settings,
            "seeds": plan.noise.seeds,
            "labels": plan.labels.tolist(),
            "weights": weights,
            "dtype": args.dtype,
            "device": str(plan.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "step_seconds": dict(zip((file.letter for file in files), step_seconds, strict=True)),
            "decode_seconds": decode_seconds,
            "rows": rows,
        },
    )
    print(f"wrote {folder}")


def sample_with_progress(
    args: argparse.Namespace, plan: SamplingPlan, denoisers: list[DiT], x_T: Tensor, y: Tensor, schedules: list[StitchSchedule], step_seconds: list[float]
) -> list[Tensor]:
    """Latents (N, C, h, w) of each schedule; the bar counts seconds of work, so that its ETA knows which steps are dear."""
    work = sum(n * s for n, s in zip(count_evaluations(schedules, plan.solver, len(denoisers)), step_seconds, strict=True))
    with tqdm(total=round(work, 2), desc="sampling", unit="s of work", bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} s of work [{elapsed}<{remaining}]") as bar:
        return sample_many(
            denoisers,
            x_T,
            y,
            schedules=schedules,
            solver=plan.solver,
            guidance=plan.guidance,
            noise=plan.noise,
            max_batch=args.max_batch,
            callback=lambda progress: bar.update(step_seconds[progress.denoiser] * len(progress.x) / len(y)),
        )


def decode(autoencoder: Autoencoder, latents: list[Tensor]) -> tuple[Tensor, float]:
    """Pictures uint8 (N, schedules, 3, H, W), and seconds to decode one schedule's."""
    autoencoder.decode(latents[0][:1])  # the first call prepares kernels
    start = time.perf_counter()
    images = torch.stack([autoencoder.decode(x) for x in tqdm(latents, desc="decoding", unit="schedule")], dim=1)
    return images, (time.perf_counter() - start) / len(latents)


def make_rows(
    plan: SamplingPlan,
    schedules: list[StitchSchedule],
    letters: list[str],
    step_seconds: list[float],
    decode_seconds: float,
    weights: dict[str, str],
) -> list[dict[str, Any]]:
    """One row for each schedule; the speed-up is against the largest model alone, decoding included."""
    alone = plan.solver.num_steps * step_seconds[-1] + decode_seconds
    quality = quality_by_schedule(plan.preset.results, plan.settings, weights)
    rows = []
    for schedule in schedules:
        seconds = predict_seconds(schedule, plan.solver, step_seconds) + decode_seconds
        rows.append(
            {
                "schedule": schedule.to_json(),
                "name": schedule.describe(letters),
                "ratio": schedule.fractions[0] if len(letters) == 2 else None,
                "steps": steps_by_denoiser(schedule.legs(plan.solver.num_steps, timesteps=plan.solver.timesteps), len(letters)),
                "seconds_per_image": seconds / len(plan.labels),
                "speed_up": alone / seconds,
                "fd_emoji": quality.get(schedule.describe(letters)),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], files: list[DenoiserFile]) -> None:
    """Print ratio (or shares), steps of each model, seconds per image, speed-up and quality."""
    cells = [
        [
            row["name"] if row["ratio"] is None else f"{row['ratio']:.1f}",
            "/".join(map(str, row["steps"])),
            f"{row['seconds_per_image']:.3f}",
            f"{row['speed_up']:.2f}",
            "-" if row["fd_emoji"] is None else f"{row['fd_emoji']:.2f}",
        ]
        for row in rows
    ]
    first = "ratio" if len(files) == 2 else "shares"
    print(markdown_table([first, f"steps {'/'.join(file.letter for file in files)}", "seconds per image", "speed-up", "FD-emoji"], cells))


def save(folder: Path, plan: SamplingPlan, rows: list[dict[str, Any]], images: Tensor, files: list[DenoiserFile]) -> None:
    """Write grid.png, and tradeoff.png where the quality of several schedules is known."""
    (folder / "tradeoff.png").unlink(missing_ok=True)  # one of an earlier run would not belong to this grid
    names = [plan.preset.class_name(label) for label in plan.labels.tolist()]
    titles = [row["name"] if row["ratio"] is None else f"ratio {row['ratio']:g}" for row in rows]
    if len(rows) == 1:
        grid = contact_sheet(images[:, 0], f"{titles[0]}, {rows[0]['seconds_per_image']:.2f} s per image")
    else:
        grid = image_grid(images, [f"{title}\n{row['seconds_per_image']:.2f} s" for title, row in zip(titles, rows, strict=True)], names)
    save_image(folder / "grid.png", grid)
    if len(rows) > 1 and all(row["fd_emoji"] is not None for row in rows):
        plot_tradeoff(
            folder / "tradeoff.png",
            {"small, large": [(row["seconds_per_image"], row["fd_emoji"], title) for title, row in zip(titles, rows, strict=True)]},
            xlabel="seconds per image on this machine",
            ylabel="FD-emoji (comparable only with itself)",
            title=f"{' + '.join(file.model for file in files)}, {plan.solver.num_steps} steps",
        )


if __name__ == "__main__":
    run(main)
