"""Sample with a small DiT that hands over to a large one, at one ratio or at all of them.

    python dit/sample_t_stitch.py --preset emoji --all_tradeoffs            # 11 ratios of the bundled small and large model
    python dit/sample_t_stitch.py --preset emoji --three_combo 0.4 0.2 0.4  # small 40 %, base 20 %, large 40 % of the steps
    python dit/sample_t_stitch.py --ratio 0.4 --s_ckpt dit_s.pt --xl_ckpt DiT-XL-2-256x256.pt

Writes grid.png (rows labels, columns schedules), results.json and, with several schedules, tradeoff.png. All schedules start from the same noise. The
seconds are those of each schedule alone: steps times the step times of the denoisers, measured here, plus decoding.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.autoencoder import Autoencoder
from tstitch.cli import SamplingPlan, add_sampling_args, new_parser, run, sampling_plan
from tstitch.files import write_json
from tstitch.plots import contact_sheet, image_grid, plot_tradeoff, save_image
from tstitch.presets import DenoiserFile
from tstitch.results import markdown_table, quality_by_schedule
from tstitch.sampling import Progress
from tstitch.schedule import RULES, StitchSchedule, two_way_ratios
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
    parser.add_argument("--max-batch", type=int, default=64, help="most pictures in one denoiser call")
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
    letters = [file.letter for file in files]
    denoisers = load_denoisers(plan, files)
    autoencoder = Autoencoder(plan.vae, plan.device)
    x_T, y = plan.noise.latents(denoisers[0].latent_shape, plan.device), plan.labels.to(plan.device)

    step_seconds = measure_step_seconds(denoisers, x_T, y, solver=plan.solver, guidance=plan.guidance)
    work = sum(n * s for n, s in zip(count_evaluations(schedules, plan.solver, len(denoisers)), step_seconds, strict=True))
    with tqdm(total=round(work, 1), desc="sampling", unit="s of work") as bar:

        def advance(progress: Progress) -> None:
            bar.update(step_seconds[progress.denoiser] * len(progress.x) / len(x_T))

        latents = sample_many(
            denoisers, x_T, y, schedules=schedules, solver=plan.solver, guidance=plan.guidance, noise=plan.noise,
            max_batch=args.max_batch, callback=advance,
        )  # fmt: skip
    start = time.perf_counter()
    images = torch.stack([autoencoder.decode(x) for x in tqdm(latents, desc="decoding", unit="schedule")], dim=1)
    decode_seconds = (time.perf_counter() - start) / len(schedules)

    rows = report(plan, schedules, letters, step_seconds, decode_seconds)
    folder = args.save_dir or Path("figures") / f"seed_{args.seed}"
    names = [plan.preset.class_name(label) for label in plan.labels.tolist()]
    if len(schedules) == 1:
        grid = contact_sheet(images[:, 0], f"{rows[0]['name']}, {rows[0]['seconds_per_image']:.2f} s per image")
    else:
        grid = image_grid(images, [f"{row['name']}\n{row['seconds_per_image']:.2f} s" for row in rows], names)
    save_image(folder / "grid.png", grid)
    if len(schedules) > 1 and all(row["fd_emoji"] is not None for row in rows):
        points = [(row["seconds_per_image"], row["fd_emoji"], f"{row['schedule'].fractions[0]:g}") for row in rows]
        plot_tradeoff(
            folder / "tradeoff.png", {"ratio of small steps": points}, xlabel="seconds per image on this machine",
            ylabel="FD-emoji (comparable only with itself)", title=f"{' + '.join(f.model for f in files)}, {plan.solver.num_steps} steps",
        )  # fmt: skip
    seconds = dict(zip(letters, step_seconds, strict=True))
    write_json(folder / "results.json", {
        "settings": plan.settings, "seeds": plan.noise.seeds, "labels": plan.labels.tolist(), "checkpoints": [str(f.path.name) for f in files],
        "dtype": args.dtype, "device": str(plan.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "step_seconds": seconds, "decode_seconds": decode_seconds,
        "rows": [row | {"schedule": row["schedule"].to_json()} for row in rows],
    })  # fmt: skip
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")


def report(plan: SamplingPlan, schedules: list[StitchSchedule], letters: list[str], step_seconds: list[float], decode_seconds: float) -> list[dict]:
    """One row for each schedule, printed as a table; the speed-up is against the largest model alone."""
    n = len(plan.labels)
    alone = plan.solver.num_steps * step_seconds[-1] + decode_seconds
    quality = quality_by_schedule(plan.preset.results, plan.settings)
    rows = []
    for schedule in schedules:
        legs = schedule.legs(plan.solver.num_steps, timesteps=plan.solver.timesteps)
        seconds = predict_seconds(schedule, plan.solver, step_seconds) + decode_seconds
        rows.append(
            {
                "schedule": schedule,
                "name": f"ratio {schedule.fractions[0]:g}" if len(letters) == 2 else schedule.describe(letters),
                "steps": [sum(leg.stop - leg.start for leg in legs if leg.denoiser == k) for k in range(len(letters))],
                "seconds_per_image": seconds / n,
                "speed_up": alone / seconds,
                "fd_emoji": quality.get(schedule.to_json()),
            }
        )
    table = [
        [
            row["name"],
            "/".join(map(str, row["steps"])),
            f"{row['seconds_per_image']:.3f}",
            f"{row['speed_up']:.2f}",
            "-" if row["fd_emoji"] is None else f"{row['fd_emoji']:.2f}",
        ]
        for row in rows
    ]
    print(markdown_table(["schedule", f"steps {'/'.join(letters)}", "seconds per image", "speed-up", "FD-emoji"], table))
    return rows


if __name__ == "__main__":
    run(main)
