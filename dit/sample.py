"""Sample pictures with one DiT.

python dit/sample.py --preset emoji                                    # the bundled large model
python dit/sample.py --model DiT-XL/2 --ckpt DiT-XL-2-256x256.pt --class-labels 207 360
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.checkpoints import DIT_CONFIGS, load_denoisers
from tstitch.autoencoder import Autoencoder
from tstitch.checkpoints import file_hash
from tstitch.cli import add_model_args, add_posenc_arg, add_sampling_args, choose_file, new_parser, run, sampling_plan
from tstitch.files import check_folder, write_json
from tstitch.plots import contact_sheet, save_image
from tstitch.schedule import StitchSchedule
from tstitch.sweep import sample_many


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    add_model_args(parser, DIT_CONFIGS)
    add_posenc_arg(parser)
    parser.add_argument("--save_dir", type=Path, default=Path("samples"), help="folder to write")
    add_sampling_args(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    plan = sampling_plan(args)
    file = choose_file(args, plan)
    check_folder(args.save_dir)
    (denoiser,) = load_denoisers(plan, [file], args.posenc)
    autoencoder = Autoencoder(plan.vae, plan.device)
    autoencoder.check_fit(denoiser.latent_shape, plan.image_size)

    with tqdm(total=plan.solver.num_steps, desc=file.model, unit="step") as bar:
        (latents,) = sample_many(
            [denoiser], plan.noise.latents(denoiser.latent_shape, plan.device), plan.labels.to(plan.device), schedules=[StitchSchedule((1.0,))],
            solver=plan.solver, guidance=plan.guidance, noise=plan.noise, max_batch=plan.max_batch, callback=lambda _: bar.update(),
        )  # fmt: skip
    images = autoencoder.decode(latents)
    save_image(args.save_dir / "sample.png", contact_sheet(images))
    write_json(
        args.save_dir / "config.json",
        {
            "model": file.model,
            "weights": file_hash(file.path),
            "settings": plan.settings,
            "seeds": plan.noise.seeds,
            "labels": plan.labels.tolist(),
            "dtype": args.dtype,
        },
    )
    print(f"wrote {args.save_dir / 'sample.png'}")


if __name__ == "__main__":
    run(main)
