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
from tstitch.cli import add_sampling_args, new_parser, run, sampling_plan
from tstitch.errors import InputError
from tstitch.files import check_folder, write_json
from tstitch.plots import contact_sheet, save_image
from tstitch.presets import DenoiserFile
from tstitch.schedule import StitchSchedule
from tstitch.sweep import sample_many


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", metavar="NAME", help=f"model size: {', '.join(DIT_CONFIGS)} (default: the preset's largest)")
    parser.add_argument("--ckpt", type=Path, help="weights (default: the preset's for that model)")
    parser.add_argument("--save_dir", type=Path, default=Path("samples"), help="folder to write")
    add_sampling_args(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, sample, save."""
    args = parse_args(argv)
    plan = sampling_plan(args)
    known = {file.model: file for file in plan.preset.denoisers}
    name = args.model or plan.preset.denoisers[-1].model
    if name not in DIT_CONFIGS:
        raise InputError(f"unknown model '{name}'; choose from {', '.join(DIT_CONFIGS)}")
    if args.ckpt is None and name not in known:
        raise InputError(f"preset {plan.preset.name} has no weights for {name}; pass --ckpt, or choose from {', '.join(known)}")
    file = known[name] if args.ckpt is None else DenoiserFile(name, name, args.ckpt)
    check_folder(args.save_dir)
    (denoiser,) = load_denoisers(plan, [file])
    autoencoder = Autoencoder(plan.vae, plan.device)
    autoencoder.check_fit(denoiser.latent_shape, plan.image_size)

    with tqdm(total=plan.solver.num_steps, desc=name, unit="step") as bar:
        (latents,) = sample_many(
            [denoiser], plan.noise.latents(denoiser.latent_shape, plan.device), plan.labels.to(plan.device), schedules=[StitchSchedule((1.0,))],
            solver=plan.solver, guidance=plan.guidance, noise=plan.noise, max_batch=plan.max_batch, callback=lambda _: bar.update(),
        )  # fmt: skip
    images = autoencoder.decode(latents)
    save_image(args.save_dir / "sample.png", contact_sheet(images))
    write_json(
        args.save_dir / "config.json",
        {
            "model": name,
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
