"""Pictures of one model: sample them, save a sheet and the record that it belongs to."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from tstitch.autoencoder import Autoencoder
from tstitch.cli import SamplingPlan
from tstitch.dry_run import Files, picture_bytes, plan_sampling
from tstitch.files import write_json
from tstitch.guidance import SizedDenoiser
from tstitch.plots import contact_sheet, save_image
from tstitch.presets import DenoiserFile
from tstitch.results import run_record
from tstitch.schedule import StitchSchedule


def sample_sheet(folder: Path, plan: SamplingPlan, denoiser: SizedDenoiser, file: DenoiserFile) -> None:
    """Sample the pictures of a plan with one denoiser; write folder/sample.png and sample.json.

    Raises:
        InputError: if the denoiser's latents and the plan's autoencoder or pictures do not belong together.
    """
    autoencoder = Autoencoder(plan.vae, plan.device)
    autoencoder.check_fit(denoiser.latent_shape, plan.image_size)
    schedules = [StitchSchedule((1.0,))]
    if plan.dry_run:
        size = 2 * picture_bytes(plan, 1)
        plan_sampling(plan, [denoiser], [file], schedules, autoencoder, [Files("sample.png and sample.json", size, folder, at_most=True)], kept=size)
        return
    work = plan.walker.work(schedules, 1)  # None where a method chooses its own steps
    with tqdm(total=None if work is None else work[0], desc=file.model, unit="evaluation") as bar:
        walked = plan.walker.walk(
            [denoiser], plan.noise.latents(denoiser.latent_shape, plan.device), plan.labels.to(plan.device), schedules=schedules, guidance=plan.guidance,
            noise=plan.noise, max_batch=plan.max_batch, callback=lambda _, evaluations: bar.update(evaluations),
        )  # fmt: skip
    save_image(folder / "sample.png", contact_sheet(autoencoder.decode(walked.latents[0])))
    ((evaluations,),) = walked.evaluations
    write_json(folder / "sample.json", run_record(plan, [file]) | {"max_batch": walked.max_batch or plan.max_batch, "evaluations": evaluations})
    print(f"wrote {folder / 'sample.png'}: {evaluations:.4g} evaluations a picture")
