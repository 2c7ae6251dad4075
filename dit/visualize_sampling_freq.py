"""Which spatial frequencies a DiT makes at each step: low ones first, high ones last.

    python dit/visualize_sampling_freq.py                                   # the bundled large model
    python dit/visualize_sampling_freq.py --model emoji-small --of x_t
    python dit/visualize_sampling_freq.py --preset imagenet256 --model DiT-S/2

Writes spectrum.png, the radially averaged power of the latents at each step, and spectrum.json with its numbers. The clean latents that a step predicts
(x_0) show what it has made so far; in the state itself (x_t) noise covers the high frequencies almost to the end.
At the very first steps x_0 is the difference of two nearly equal noises, enlarged up to 157 times: those curves lie high, and say little.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import DIT_CONFIGS, load_denoisers
from tstitch.analysis import radial_counts, walk_spectra
from tstitch.cli import OUTPUT, add_model_args, add_posenc_arg, add_sampling_args, choose_file, help_group, new_parser, run, sampling_plan
from tstitch.files import check_folder, write_json
from tstitch.plots import plot_spectra
from tstitch.results import markdown_table, run_record

OF = {"x_0": "power of the predicted clean latents", "x_t": "power of the latents after the step"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_model_args(parser, DIT_CONFIGS)
    add_posenc_arg(parser)
    output = help_group(parser, OUTPUT)
    output.add_argument("--of", choices=OF, default="x_0", help="draw the predicted clean latents or the noisy state")
    output.add_argument("--save_dir", type=Path, default=Path("figures/frequency"), help="folder to write")
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji", num_images=32)
    return parser.parse_args(argv)


def table(powers: Tensor, timesteps: list[int]) -> str:
    """Power in the lower, middle and upper third of the frequencies, relative to the last step; about ten of the steps."""
    thirds = [band.mean(dim=1) for band in powers[:, 1:].tensor_split(3, dim=1)]  # 0 cycles is the mean of the latents, no structure
    shown = range(0, len(timesteps), max(1, len(timesteps) // 10))
    cells = [[str(i + 1), str(timesteps[i]), *(f"{float(third[i] / third[-1]):.3f}" for third in thirds)] for i in shown]
    return markdown_table(["step", "t", "low", "middle", "high"], cells)


def main(argv: list[str] | None = None) -> None:
    """Walk, draw, save."""
    args = parse_args(argv)
    plan = sampling_plan(args)
    file = choose_file(args, plan)
    check_folder(args.save_dir)
    (denoiser,) = load_denoisers(plan, [file], args.posenc)
    x_T, y = plan.noise.latents(denoiser.latent_shape, plan.device), plan.labels.to(plan.device)
    powers = walk_spectra(denoiser, x_T, y, solver=plan.solver, guidance=plan.guidance, noise=plan.noise, max_batch=plan.max_batch)
    timesteps = plan.solver.timesteps
    whole = powers[args.of][:, : plan.latent_size // 2 + 1]  # beyond, only the corners of the square hold frequencies
    plot_spectra(args.save_dir / "spectrum.png", whole, timesteps, ylabel=OF[args.of], title=f"{file.model}, {len(y)} images")
    write_json(
        args.save_dir / "spectrum.json",
        run_record(plan, [file])
        | {
            "timesteps": timesteps,
            "counts": radial_counts(plan.latent_size).tolist(),
            "power": {name: power.tolist() for name, power in powers.items()},
        },
    )
    print(f"{OF[args.of]}, by thirds of the frequencies, relative to the last step")
    print(table(whole, timesteps))
    print(f"wrote {args.save_dir}")


if __name__ == "__main__":
    run(main)
