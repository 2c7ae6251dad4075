"""What the LDM sampling scripts share: their words, and the plan, the models and the schedules that these words ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ldm.autoencoder import find, first_stage_source
from ldm.checkpoints import load_ldm_denoisers, read_ldm_facts
from ldm.config import LDMConfig, read_model, read_yaml
from ldm.denoiser import LatentDenoiser
from ldm.networks import build_ldm_first_stage
from ldm.sampling import RandomUncondWalker, ldm_diffusion, published_schedule
from tstitch.cli import MODELS, SAMPLING, STITCHING, SamplingPlan, help_group, sampling_plan
from tstitch.compiled import Compiled
from tstitch.diffusion import GaussianDiffusion
from tstitch.errors import InputError
from tstitch.presets import LDM_PRESETS, DenoiserFile, Preset, get_preset
from tstitch.schedule import RULES, StitchSchedule
from tstitch.solvers import DDIM, Solver, create_solver
from tstitch.walker import SolverWalker

SOLVERS = ("ddim", "plms", "dpm++")
BETAS = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "beta_schedule": "linear"}  # where no yaml says others

Load = Callable[[SamplingPlan, Sequence[DenoiserFile]], list[LatentDenoiser]]


def add_ldm_args(parser: argparse.ArgumentParser) -> None:
    """Add the words of the LDM scripts; `ldm_plan` and `hand_over` read them."""
    group = help_group(parser, MODELS)
    group.add_argument("--ldm_s_path", type=Path, metavar="FILE", help="weights of the small model: a LatentDiffusion .ckpt, or one that ldm/main.py exported")
    group.add_argument("--ldm_path", type=Path, metavar="FILE", help="weights of the large model (default of both: the preset's)")
    group.add_argument("--ae_ckpt", metavar="PATH", help="weights of the configuration's first stage (default: what its ckpt_path says)")
    group.add_argument("--cfg", type=Path, metavar="YAML", help="configuration of the pair (default: the preset's; exported weights need none)")
    group.add_argument("--use", choices=["ema", "model"], help="moving average or raw weights (default: the average where there is one)")
    group = help_group(parser, SAMPLING)
    group.add_argument("--solver", choices=SOLVERS, default="ddim", help="what walks LDM's grid of timesteps")
    group.add_argument("--ddim_eta", type=float, metavar="ETA", help="noise of ddim, 0..1 (default: 1, as published; 0 for the emoji models)")
    group.add_argument(
        "--uncond", choices=["null", "random"],
        help="what guidance starts from: the learned null label, or a context drawn for each picture, as published (default: null where it was learned)",
    )  # fmt: skip
    help_group(parser, STITCHING).add_argument(
        "--switch-by", choices=RULES[:2], default="step", help="share of the steps, or of the training timesteps (the published LDM rule)"
    )


def ldm_plan(args: argparse.Namespace, fid: bool = False, each: int = 1) -> tuple[SamplingPlan, list[DenoiserFile], Load]:
    """Check the arguments and complete the plan; small and large; and what loads them as load(plan, files).

    Args:
        fid: as in `tstitch.cli.sampling_plan`.
        each: pictures of each of the preset's classes, where neither labels nor their number are given.

    Raises:
        InputError: for the first argument that cannot be used, or a configuration that is no pair.
    """
    args.preset = args.preset or "imagenet256"
    preset = get_preset(args.preset, LDM_PRESETS)
    config = _read_pair(args.cfg or preset.config)
    if args.ae_ckpt and (config is None or args.vae):
        raise InputError("--ae_ckpt are weights of the first stage of --cfg; pass --cfg and no --vae with it, or an autoencoder with --vae alone")
    shown = _as_configured(preset, config)
    if args.num_images is None and not fid:
        shown = replace(shown, labels=tuple(label for label in preset.labels for _ in range(each)))
    plan = sampling_plan(args, fid=fid, presets={preset.name: shown}, diffusion=False)
    files = [replace(file, path=path or file.path) for file, path in zip(preset.denoisers, (args.ldm_s_path, args.ldm_path), strict=True)]
    facts = [read_ldm_facts(file.path, plan.num_classes) for file in files]
    if config is not None and not args.vae:
        scale = _scale_factor(files, [fact.scale_factor for fact in facts], config)
        plan = replace(plan, vae=first_stage_source(config.first_stage, args.ae_ckpt, scale))
    betas = BETAS | dict(config.betas if config else {})
    solver = _solver(args, ldm_diffusion(plan.num_steps, **betas), eta=0.0 if preset.name == "emoji" else 1.0)
    learned = all(fact.has_null_label for fact in facts)
    uncond = args.uncond or ("null" if learned else "random")
    if uncond == "null" and not learned and plan.guidance.scale != 1:
        raise InputError("a model of this pair has not learned a null label to guide from; pass --uncond random or --cfg-scale 1")
    walker = SolverWalker(solver) if uncond == "null" else RandomUncondWalker(solver)
    also = {"eta": getattr(solver, "eta", 0.0), "uncond": uncond, "use": args.use, "betas": betas}
    return replace(plan, walker=walker, learned_null=uncond == "null", also=also), files, partial(_load, config=config, use=args.use)


def _scale_factor(files: Sequence[DenoiserFile], stored: Sequence[float | None], config: LDMConfig) -> float:
    """What the latents are multiplied by: the configuration's, or what the files say where they do."""
    said = {str(file.path): scale for file, scale in zip(files, stored, strict=True) if scale is not None}
    if config.scale_factor != 1 or not said:
        said["the configuration"] = config.scale_factor
    if max(said.values()) > min(said.values()) * (1 + 1e-6):
        values = ", ".join(f"{scale:g} in {place}" for place, scale in said.items())
        raise InputError(f"the latents' scale_factor is {values}; stitch models of one first stage and one scale")
    return next(iter(said.values()))


def _read_pair(path: Path | None) -> LDMConfig | None:
    if path is None:
        return None
    config = read_model(read_yaml([find(str(path))]))
    if len(config.unets) != 2:
        raise InputError(f"{path} configures one U-Net; pass the configuration of a pair, such as ldm/configs/cin-ldm-vq-f8-t-stitch.yaml")
    return config


def _as_configured(preset: Preset, config: LDMConfig | None) -> Preset:
    """The preset with what its configuration says of pictures and classes; an autoencoder in diffusers format has the preset's pixels per latent."""
    if config is None:
        return preset
    downsampling = preset.downsampling
    if config.first_stage.kind != "diffusers":
        with torch.device("meta"):
            network = build_ldm_first_stage(config.first_stage.params, config.first_stage.kind)
        downsampling = 2 ** (len(network.config.block_out_channels) - 1)
    return replace(preset, image_size=config.latent_shape[1] * downsampling, downsampling=downsampling, num_classes=config.num_classes)


def _solver(args: argparse.Namespace, process: GaussianDiffusion, eta: float) -> Solver:
    if args.solver == "ddim":
        return DDIM(process, eta if args.ddim_eta is None else args.ddim_eta)
    if args.ddim_eta:
        raise InputError(f"--ddim_eta belongs to ddim, and {args.solver} adds no noise; leave it out")
    return create_solver(args.solver, process)


def _load(plan: SamplingPlan, files: Sequence[DenoiserFile], config: LDMConfig | None, use: str | None) -> list[LatentDenoiser]:
    """Load the denoisers of a plan onto its device, in its number type."""
    denoisers = []
    for k, file in enumerate(files):
        (model,) = load_ldm_denoisers(file.path, None if config is None else [config.unets[k]], plan.num_classes, use)
        plan.check_fit(model, file.path)
        denoisers.append(model.to(plan.device, plan.dtype))
        if plan.compiles:
            model.forward = Compiled(model.forward, plan.device, plan.dtype)
    return denoisers


def hand_over(args: argparse.Namespace, plan: SamplingPlan, schedules: Sequence[StitchSchedule]) -> list[StitchSchedule]:
    """Schedules of small and large under the rule of --switch-by; those of the published rule have the shares of the steps that it comes to."""
    if args.switch_by == "step":
        return list(schedules)
    return [published_schedule(schedule.fractions[0], plan.solver, plan.also["betas"]["timesteps"]) for schedule in schedules]
