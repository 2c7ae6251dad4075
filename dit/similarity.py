"""How alike the noise predictions of DiTs of different sizes are, along one trajectory: the reason why stitching works.

    python dit/similarity.py                                                # small, base and large emoji model
    python dit/similarity.py --preset imagenet256 --num-sampling-steps 100

The largest model walks; at each step all models predict the noise in the same state. Prints, draws (similarity.png) and writes (similarity.json) the
cosine of each pair of predictions, all elements of an image as one vector, averaged over the images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import load_denoisers
from tstitch.analysis import walk_similarity
from tstitch.cli import OUTPUT, add_sampling_args, help_group, new_parser, run, sampling_plan
from tstitch.errors import InputError
from tstitch.files import check_folder, write_json
from tstitch.plots import plot_bands
from tstitch.results import markdown_table, run_record


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    help_group(parser, OUTPUT).add_argument("--save_dir", type=Path, default=Path("figures/similarity"), help="folder to write")
    add_sampling_args(parser)
    parser.set_defaults(preset="emoji", num_images=32)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Walk, compare, save."""
    args = parse_args(argv)
    plan = sampling_plan(args)
    files = plan.preset.denoisers
    if len(plan.labels) < 2:
        raise InputError("a spread needs at least 2 images; pass a larger --num-images")
    check_folder(args.save_dir)
    denoisers = load_denoisers(plan, files)
    x_T, y = plan.noise.latents(denoisers[-1].latent_shape, plan.device), plan.labels.to(plan.device)
    cosines = walk_similarity(denoisers, x_T, y, solver=plan.solver, guidance=plan.guidance, noise=plan.noise, max_batch=plan.max_batch)
    curves = {f"{files[j].model}, {files[k].model}": (values.mean(dim=1), values.std(dim=1)) for (j, k), values in cosines.items()}
    plot_bands(
        args.save_dir / "similarity.png",
        curves,
        xlabel="step, the noisiest first",
        ylabel="cosine of the predicted noise",
        title=f"{len(y)} images; bands: one standard deviation over them",
    )
    write_json(
        args.save_dir / "similarity.json",
        run_record(plan, files)
        | {
            "timesteps": plan.solver.timesteps,
            "cosine": {name: {"mean": mean.tolist(), "std": spread.tolist()} for name, (mean, spread) in curves.items()},
        },
    )
    cells = [
        [str(i + 1), str(t), *(f"{float(mean[i]):.4f} ± {float(spread[i]):.4f}" for mean, spread in curves.values())]
        for i, t in enumerate(plan.solver.timesteps)
    ]
    print(markdown_table(["step", "t", *curves], cells))
    print(f"wrote {args.save_dir}")


if __name__ == "__main__":
    run(main)
