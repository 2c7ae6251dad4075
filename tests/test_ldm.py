"""Laws of the U-Net backbone: names and bits of checkpoints, refused options, PLMS, unconditional contexts, samples and their batch."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from ldm_tiny import DDCONFIG, KL, VQ, randomised
from torch import Tensor, nn

from ldm.checkpoints import LDMCheckpoint, compvis_state_dict, load_ldm_denoisers, load_ldm_first_stage, load_ldm_unet, read_ldm, read_ldm_first_stage
from ldm.denoiser import LatentDenoiser
from ldm.losses import p_losses
from ldm.names import compvis_names, compvis_shape
from ldm.networks import build_ldm_first_stage, build_ldm_unet
from ldm.sampling import PLMS, RandomUncondWalker, ddim_timesteps, draw_unconditional, ldm_betas, ldm_diffusion, published_schedule
from tstitch.diffusion import GaussianDiffusion
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.noise import SampleNoise
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule, two_way_ratios
from tstitch.solvers import DDIM, DPMSolverPP, Solver
from tstitch.sweep import sample_many
from tstitch.tune import measure_step_seconds

SMALL = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [2], "num_res_blocks": 1, "channel_mult": [1],
    "num_heads": 2, "use_spatial_transformer": True, "context_dim": 8,
}  # fmt: skip
LARGE = SMALL | {"attention_resolutions": [2, 1], "channel_mult": [1, 1], "context_dim": 16}
PUBLISHED = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2, "channel_mult": [1, 2, 4],
    "num_head_channels": 32, "use_spatial_transformer": True, "transformer_depth": 1,
}  # fmt: skip
PUBLISHED_VQ = {
    "embed_dim": 4, "n_embed": 16384, "lossconfig": {"target": "torch.nn.Identity"}, "ckpt_path": "vq-f8.ckpt",
    "ddconfig": DDCONFIG | {"resolution": 256, "ch": 128, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [32]},
}  # fmt: skip


def denoiser(params: dict, seed: int, rows: int = 11) -> LatentDenoiser:
    unet = randomised(build_ldm_unet(params), seed)
    return LatentDenoiser(unet, nn.Embedding.from_pretrained(torch.randn(rows, params["context_dim"], generator=torch.Generator().manual_seed(seed))), 10)


@pytest.fixture(scope="module")
def small_and_large() -> list[LatentDenoiser]:
    return [denoiser(SMALL, 1), denoiser(LARGE, 2)]


@pytest.fixture(scope="module")
def without_null() -> list[LatentDenoiser]:
    return [denoiser(SMALL, 1, rows=10), denoiser(LARGE, 2, rows=10)]


def whole(params: list[dict]) -> LDMCheckpoint:
    """A LatentDiffusion of these U-Nets with all its parts, every value its own."""
    unets = [compvis_state_dict(randomised(build_ldm_unet(p), k)) for k, p in enumerate(params)]
    ema = [{name: value + 1 for name, value in unet.items()} for unet in unets]
    buffers = {"betas": torch.rand(1000), "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    embedders = [{"embedding.weight": torch.randn(10, p["context_dim"])} for p in params]
    return LDMCheckpoint(unets, ema, embedders, compvis_state_dict(randomised(build_ldm_first_stage(VQ, "vq"), 5)), buffers)


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(value.dtype == b[name].dtype and torch.equal(value, b[name]) for name, value in a.items())


# Names and networks


def tagged(model: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """A state dict in CompVis' names and shapes, each tensor filled with its place in the list."""
    names, own = compvis_names(model), model.state_dict()
    listed = list(names.values())
    return listed, {names[name]: torch.tensor(listed.index(names[name])).expand(compvis_shape(names[name], value.shape)) for name, value in own.items()}


@pytest.mark.parametrize("options", [{}, {"attention_resolutions": [2]}, {"channel_mult": [1]}, {"num_res_blocks": 1, "transformer_depth": 2}], ids=str)
def test_names_of_the_unet_are_those_of_the_library_s_converter(options: dict) -> None:
    with torch.device("meta"):
        unet = build_ldm_unet(PUBLISHED | {"model_channels": 64, "context_dim": 256, "channel_mult": [1, 2, 4, 4]} | options)
    listed, state = tagged(unet)
    converted = convert_ldm_unet_checkpoint({f"model.diffusion_model.{name}": tag for name, tag in state.items()}, unet.config)
    assert {name: listed[int(tag.flatten()[0])] for name, tag in converted.items()} == compvis_names(unet)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_names_of_the_first_stage_are_those_of_the_library_s_converter(kind: str) -> None:
    params = PUBLISHED_VQ | {"ddconfig": PUBLISHED_VQ["ddconfig"] | {"attn_resolutions": [], "double_z": kind == "kl"}}  # it knows the middle's attention only
    with torch.device("meta"):
        model = build_ldm_first_stage(params, kind)
    listed, state = tagged(model)
    converted = convert_ldm_vae_checkpoint({f"first_stage_model.{name}": tag for name, tag in state.items()}, model.config)
    ours = {name: compvis for name, compvis in compvis_names(model).items() if not name.startswith("quantize.")}
    assert {name: listed[int(tag.flatten()[0])] for name, tag in converted.items()} == ours


@pytest.mark.parametrize(("width", "context", "parameters"), [(256, 512, 394_984_196), (64, 256, 25_386_692)])
def test_published_unets_have_their_published_sizes(width: int, context: int, parameters: int) -> None:
    with torch.device("meta"):
        unet = build_ldm_unet(PUBLISHED | {"model_channels": width, "context_dim": context})
    assert (sum(p.numel() for p in unet.parameters()), len(unet.state_dict())) == (parameters, 626)


def test_the_published_first_stage_has_its_published_size() -> None:
    with torch.device("meta"):
        model = build_ldm_first_stage(PUBLISHED_VQ, "vq")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 67.7
    assert "decoder.up.3.attn.2.q.weight" in compvis_names(model).values()  # 32x32 is the coarsest level


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}, {"num_head_channels": 16}, {"transformer_depth": 2}, {"num_classes": 5}], ids=str)
def test_a_unet_comes_back_bit_for_bit(options: dict) -> None:
    state = compvis_state_dict(randomised(build_ldm_unet(LARGE | options), 3))
    assert equal_bits(compvis_state_dict(load_ldm_unet(state, LARGE | options)), state)


@pytest.mark.parametrize(("params", "kind"), [(VQ, "vq"), (KL, "kl"), (VQ | {"ddconfig": DDCONFIG | {"attn_type": "none"}}, "vq")], ids=["vq", "kl", "no attn"])
def test_a_first_stage_comes_back_bit_for_bit(params: dict, kind: str) -> None:
    state = compvis_state_dict(randomised(build_ldm_first_stage(params, kind), 3))
    assert equal_bits(compvis_state_dict(load_ldm_first_stage(state, params, kind)), state)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("resblock_updown", True), ("conv_resample", False), ("use_spatial_transformer", False), ("dims", 3), ("n_embed", 8), ("no_such_option", 1),
        ("num_head_channels", 64), ("transformer_depth", [1, 2]), ("model_channels", 48), ("context_dim", None),
    ],
)  # fmt: skip
def test_a_unet_that_the_library_cannot_express_is_refused_by_its_option(option: str, value: object) -> None:
    with pytest.raises(InputError, match=option):
        build_ldm_unet(SMALL | {option: value})


@pytest.mark.parametrize("option", ["model_channels", "context_dim", "use_spatial_transformer", "num_heads"])
def test_a_unet_without_a_needed_option_is_refused_by_it(option: str) -> None:
    with pytest.raises(InputError, match=option):
        build_ldm_unet({name: value for name, value in SMALL.items() if name != option})


@pytest.mark.parametrize(
    ("params", "kind", "named"),
    [
        *((VQ | {"ddconfig": DDCONFIG | {name: value}}, "vq", name) for name, value in (
            ("resamp_with_conv", False), ("dropout", 0.1), ("tanh_out", True), ("attn_type", "linear"), ("no_such_part", 1), ("ch", 48),
        )),
        (VQ | {"remap": "codes.npy"}, "vq", "remap"), (VQ | {"no_such": 1}, "vq", "no_such"), (VQ, "kl", "double_z"), (KL, "vq", "double_z"),
        (KL | {"embed_dim": 3}, "kl", "embed_dim"), ({"ddconfig": DDCONFIG, "embed_dim": 4}, "vq", "n_embed"), (VQ, "vae", "vae"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_first_stage_that_the_library_cannot_express_is_refused_by_its_option(params: dict, kind: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_ldm_first_stage(params, kind)


# Checkpoints


@pytest.mark.parametrize("params", [[LARGE], [SMALL, LARGE]], ids=["one", "t-stitch"])
def test_a_whole_checkpoint_comes_back_bit_for_bit_through_the_library_s_networks(params: list[dict], tmp_path: Path) -> None:
    original = whole(params).state_dict()
    torch.save({"state_dict": original, "epoch": 3, "global_step": 12, "optimizer_states": [{}]}, tmp_path / "ldm.ckpt")
    parts = read_ldm(tmp_path / "ldm.ckpt")
    for states in (parts.unets, parts.ema):
        states[:] = [compvis_state_dict(load_ldm_unet(state, p)) for state, p in zip(states, params, strict=True)]
    parts.first_stage = compvis_state_dict(load_ldm_first_stage(parts.first_stage, VQ))
    assert equal_bits(parts.state_dict(), original)


def test_moving_averages_are_named_without_dots() -> None:
    names = whole([LARGE]).state_dict().keys() | whole([SMALL, LARGE]).state_dict().keys()
    assert {"model_ema.diffusion_modelinput_blocks00weight", "model_ema.diffusion_modelanchors1out2bias", "model_ema.decay"} <= names


def test_denoisers_of_a_file_use_the_moving_average_and_their_own_contexts(tmp_path: Path) -> None:
    parts = whole([SMALL, LARGE])
    torch.save({"state_dict": parts.state_dict()}, tmp_path / "t_stitch.ckpt")
    loaded = load_ldm_denoisers(tmp_path / "t_stitch.ckpt", [SMALL, LARGE], num_classes=10)
    y = torch.tensor([3, 0])
    for k, model in enumerate(loaded):
        assert equal_bits(compvis_state_dict(model.unet), parts.ema[k])
        assert torch.equal(model.context(y)[:, 0], parts.embedders[k]["embedding.weight"][y])
    raw = load_ldm_denoisers(tmp_path / "t_stitch.ckpt", [SMALL, LARGE], num_classes=10, use="model")
    assert equal_bits(compvis_state_dict(raw[1].unet), parts.unets[1])
    for wrong, told in (([LARGE], 10), ([LARGE, SMALL], 10), ([SMALL, LARGE], 8)):
        with pytest.raises(InputError):
            load_ldm_denoisers(tmp_path / "t_stitch.ckpt", wrong, num_classes=told)


def test_a_file_of_an_old_lightning_is_read_without_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    callbacks = {module.ModelCheckpoint: {"best_model_score": np.float32(0.5), "monitor": "val/loss_simple_ema"}}
    state = whole([SMALL]).state_dict()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", ModuleType("pytorch_lightning.callbacks"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"state_dict": state, "callbacks": callbacks, "pytorch-lightning_version": "1.4.2"}, tmp_path / "old.ckpt")
    assert equal_bits(read_ldm(tmp_path / "old.ckpt").state_dict(), state)


def test_a_first_stage_is_read_from_its_own_file_and_from_a_whole_one(tmp_path: Path) -> None:
    parts = whole([SMALL])
    torch.save({"state_dict": parts.first_stage | {"loss.discriminator.main.0.weight": torch.zeros(1)}}, tmp_path / "vq.ckpt")
    torch.save({"state_dict": parts.state_dict()}, tmp_path / "ldm.ckpt")
    for name in ("vq.ckpt", "ldm.ckpt"):
        assert equal_bits(read_ldm_first_stage(tmp_path / name), parts.first_stage)
    parts.first_stage = {}
    torch.save({"state_dict": parts.state_dict()}, tmp_path / "ldm.ckpt")
    with pytest.raises(InputError, match="no first_stage_model"):
        read_ldm_first_stage(tmp_path / "ldm.ckpt")


def test_keys_that_fit_nowhere_are_named() -> None:
    state = whole([SMALL]).state_dict()
    for key in ("cond_stage_model.transformer.weight", "model_ema.diffusion_modelnonsense", "lvlb_weights"):
        with pytest.raises(InputError, match=key):
            LDMCheckpoint.from_state_dict(state | {key: torch.zeros(1)})
    with pytest.raises(InputError, match="model_ema.diffusion_modelout2bias"):
        LDMCheckpoint.from_state_dict({key: value for key, value in state.items() if key != "model_ema.diffusion_modelout2bias"})
    with pytest.raises(InputError, match="model.diffusion_model"):
        LDMCheckpoint.from_state_dict({"betas": state["betas"]})


def test_tensors_that_are_missing_left_over_or_misshapen_are_named() -> None:
    state = compvis_state_dict(build_ldm_unet(SMALL))
    with pytest.raises(InputError, match=r"out\.2\.bias is missing"):
        load_ldm_unet({name: value for name, value in state.items() if name != "out.2.bias"}, SMALL)
    with pytest.raises(InputError, match=r"extra\.weight is unknown"):
        load_ldm_unet(state | {"extra.weight": torch.zeros(1)}, SMALL)
    with pytest.raises(InputError, match=r"to_k\.weight is \[32, 8\], the model has \[32, 16\]"):
        load_ldm_unet(state, SMALL | {"context_dim": 16})
    first_stage = compvis_state_dict(build_ldm_first_stage(VQ, "vq"))
    with pytest.raises(InputError, match=r"quantize\.embedding\.weight"):
        load_ldm_first_stage(first_stage, VQ | {"n_embed": 8})


# The process and its solvers


def test_the_grid_is_ascending_within_the_training_timesteps_for_every_number_of_steps() -> None:
    for steps in range(1, 1001):
        grid = ddim_timesteps(steps)
        assert grid[0] == 1
        assert grid[-1] <= 999
        assert all(a < b for a, b in zip(grid, grid[1:], strict=False))
        assert len(grid) >= min(steps, 999)
    assert ddim_timesteps(3) == [1, 334, 667]  # the published grid has 1000 as well, and fails
    assert len(ddim_timesteps(7)) == 8
    for wrong in (0, 1001):
        with pytest.raises(InputError, match="sampling steps"):
            ddim_timesteps(wrong)


def test_unknown_words_of_the_schedule_are_refused() -> None:
    with pytest.raises(InputError, match="linar"):
        ldm_betas("linar")
    with pytest.raises(InputError, match="even"):
        ddim_timesteps(10, spacing="even")
    with pytest.raises(InputError, match="l3"):
        p_losses(ldm_diffusion(None), lambda x, t, y: x, torch.zeros(1, 4, 2, 2), torch.tensor([0]), torch.tensor([0]), loss_type="l3")


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 200, 250])
def test_the_published_hand_over_is_ours_where_the_steps_divide_a_thousand(steps: int) -> None:
    solver = DDIM(ldm_diffusion(steps))
    for schedule in two_way_ratios():
        assert published_schedule(schedule.fractions[0], solver).legs(steps) == schedule.legs(steps)


def test_the_published_hand_over_asks_the_timestep() -> None:
    solver = DDIM(ldm_diffusion(7))  # 995, 853, 711, ...
    assert published_schedule(0.3, solver).legs(8)[0].stop == 3  # three above 700; three tenths of eight steps would be two
    assert StitchSchedule.from_ratio(0.3).legs(8)[0].stop == 2


DATA_STD, DATA_MEAN = 0.5, 0.3


def gaussian_eps(alphas_cumprod: np.ndarray):
    """The exact noise prediction for data N(DATA_MEAN, DATA_STD^2)."""
    abar = torch.from_numpy(alphas_cumprod)

    def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * DATA_MEAN) / (a * DATA_STD**2 + 1 - a)

    return exact


def flow_error(solver: Solver, diffusion: GaussianDiffusion) -> float:
    """Largest distance from the probability-flow ODE, which keeps (x - sqrt(abar) mean) / std_t, before the last step and its jump to zero noise."""
    x_T = torch.linspace(-2, 2, 16, dtype=torch.float64).view(16, 1, 1, 1)
    seen: list[Tensor] = []
    sample(
        [gaussian_eps(np.cumprod(1 - ldm_betas()))], x_T, torch.zeros(16, dtype=torch.long), schedule=StitchSchedule((1.0,)), solver=solver,
        callback=lambda progress: seen.append(progress.x),
    )  # fmt: skip
    start, end = diffusion.alphas_cumprod[-1], diffusion.alphas_cumprod[0]
    std_start, std_end = (math.sqrt(a * DATA_STD**2 + 1 - a) for a in (start, end))
    exact = math.sqrt(end) * DATA_MEAN + std_end * (x_T - math.sqrt(start) * DATA_MEAN) / std_start
    return (seen[-2] - exact).abs().max().item()


@pytest.mark.parametrize(("make_solver", "order"), [(DDIM, 1), (PLMS, 2)])
def test_plms_is_of_second_order_where_ddim_is_of_first(make_solver: Callable[..., Solver], order: int) -> None:
    processes = [GaussianDiffusion(ldm_betas(), list(range(20, 901, stride)), learn_sigma=False) for stride in (40, 20, 10, 5)]
    errors = [flow_error(make_solver(process), process) for process in processes]
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(order - 0.1 < measured < order + 0.6 for measured in orders), orders


@pytest.mark.parametrize("make_solver", [DDIM, PLMS, DPMSolverPP])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_with_the_true_eps_solvers_end_at_alpha_bar_of_timestep_0_and_the_multistep_one_at_data(make_solver: Callable[..., Solver], steps: int) -> None:
    process = ldm_diffusion(steps)
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, end = process.alphas_cumprod[-1], np.float32(1 - 0.0015).item()
    x_T, y = math.sqrt(start) * x_0 + math.sqrt(1 - start) * eps, torch.zeros(3, dtype=torch.long)
    ours = sample([lambda x, t, y: eps], x_T, y, schedule=StitchSchedule((1.0,)), solver=make_solver(process))
    expected = x_0 if make_solver is DPMSolverPP else math.sqrt(end) * x_0 + math.sqrt(1 - end) * eps
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_plms_equals_the_library_s(steps: int) -> None:
    library = PNDMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    library.set_timesteps(steps)
    solver, exact = PLMS(ldm_diffusion(steps)), gaussian_eps(np.cumprod(1 - ldm_betas()))
    assert solver.timesteps == library.timesteps.tolist()
    x = x_T = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(3, dtype=torch.long)
    for t in library.timesteps:
        x = library.step(exact(x, t.expand(3), y), t, x).prev_sample
    ours = sample([exact], x_T, y, schedule=StitchSchedule((1.0,)), solver=solver)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-6)


def test_plms_keeps_its_memory_when_the_denoiser_changes() -> None:
    solver, exact = PLMS(ldm_diffusion(20)), gaussian_eps(np.cumprod(1 - ldm_betas()))
    x_T, y = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.zeros(2, dtype=torch.long)
    alone = sample([exact], x_T, y, schedule=StitchSchedule((1.0,)), solver=solver)
    stitched = sample([exact, lambda x, t, y: exact(x, t, y)], x_T, y, schedule=StitchSchedule.from_ratio(0.4), solver=solver)
    assert torch.equal(stitched, alone)


def test_the_loss_without_weights_is_that_of_the_process(small_and_large: list[LatentDenoiser]) -> None:
    process, model = ldm_diffusion(None), small_and_large[0]
    x_0, noise, t, y = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([1, 2, 10])
    with torch.no_grad():
        ours = p_losses(process, model, x_0, t, y, noise)
        theirs = process.training_losses(model, x_0, t, {"y": y}, noise)
    assert torch.equal(ours["per_sample"], theirs["mse"])
    assert torch.equal(ours["loss"], theirs["mse"].mean())


# Denoisers


def test_the_null_label_is_the_learned_row_unless_a_context_is_given(small_and_large: list[LatentDenoiser]) -> None:
    model = denoiser(SMALL, 1)
    y = torch.tensor([3, 10, 0, 10])
    assert torch.equal(model.context(y)[:, 0], model.embedder.weight[y])
    model.unconditional = torch.stack([torch.full((1, 8), 2.0), torch.full((1, 8), 4.0)])
    assert model.context(y)[:, 0, 0].tolist() == [model.embedder.weight[3, 0].item(), 4.0, model.embedder.weight[0, 0].item(), 4.0]
    with pytest.raises(ValueError, match="2 samples"):
        model.context(y[:3])


def test_half_precision_weights_take_and_give_float32() -> None:
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.tensor([1, 10])
    expected = denoiser(LARGE, 2)(x, t, y)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        out = denoiser(LARGE, 2).to(dtype)(x, t, y)
        assert out.dtype == torch.float32
        assert (out - expected).abs().max() < tolerance * expected.abs().max()


def test_a_table_of_another_number_of_classes_is_refused() -> None:
    with pytest.raises(InputError, match="12 rows"):
        denoiser(SMALL, 1, rows=12)


def test_random_unconditional_contexts_are_uniform_and_belong_to_their_seed() -> None:
    drawn = draw_unconditional(SampleNoise(range(64)), 64, 256)
    assert drawn.shape == (64, 1, 256)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert np.abs(np.histogram(drawn, bins=8, range=(0, 1), density=True)[0] - 1).max() < 0.1
    assert torch.equal(drawn[5:7], draw_unconditional(SampleNoise([5, 6]), 2, 256))


@pytest.mark.parametrize("make_solver", [lambda d: DDIM(d, eta=1.0), PLMS, DPMSolverPP], ids=["ddim", "plms", "dpm++"])
def test_a_sample_depends_neither_on_its_batch_nor_on_the_sweep(make_solver: Callable[..., Solver], without_null: list[LatentDenoiser]) -> None:
    walker = RandomUncondWalker(make_solver(ldm_diffusion(5)))
    guidance, y = ClassifierFreeGuidance(3.0, 10, channels=None), torch.tensor([1, 7, 4])

    def walk(rows: list[int], ratios: list[float], max_batch: int) -> list[Tensor]:
        noise = SampleNoise([100 + row for row in rows])
        schedules = [StitchSchedule.from_ratio(ratio) for ratio in ratios]
        x_T = noise.latents(without_null[0].latent_shape)
        return walker.walk(without_null, x_T, y[rows], schedules=schedules, guidance=guidance, noise=noise, max_batch=max_batch).latents

    together = walk([0, 1, 2], [0.0, 0.4, 1.0], max_batch=64)
    for ratio, samples in zip([0.0, 0.4, 1.0], together, strict=True):
        torch.testing.assert_close(walk([1], [ratio], max_batch=1)[0][0], samples[1], rtol=1e-3, atol=1e-3)
    for a, b in zip(walk([0, 1, 2], [0.0, 0.4, 1.0], max_batch=4), together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert walker.settings["uncond"] == "random"


def test_random_contexts_keep_calls_bounded_and_leave_nothing_behind(without_null: list[LatentDenoiser], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, forward = [], LatentDenoiser.forward

    def recorded(self: LatentDenoiser, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(self, x, t, y)

    monkeypatch.setattr(LatentDenoiser, "forward", recorded)
    walker, noise = RandomUncondWalker(DDIM(ldm_diffusion(2))), SampleNoise(range(5))
    arguments = {"guidance": ClassifierFreeGuidance(3.0, 10, channels=None), "noise": noise, "max_batch": 2}
    walked = walker.walk(without_null, noise.latents(without_null[0].latent_shape), torch.arange(5), schedules=[StitchSchedule.from_ratio(0.5)], **arguments)
    assert walked.latents[0].shape[0] == 5 and max(sizes) == 4  # guidance doubles the two
    assert all(denoiser.unconditional is None for denoiser in without_null)


@pytest.mark.parametrize("make_solver", [lambda d: DDIM(d, eta=0.5), PLMS], ids=["ddim", "plms"])
def test_a_sweep_of_unets_of_unequal_contexts_equals_single_runs(make_solver: Callable[..., Solver], small_and_large: list[LatentDenoiser]) -> None:
    noise, y = SampleNoise([1, 2]), torch.tensor([3, 9])
    settings = {"solver": make_solver(ldm_diffusion(5)), "guidance": ClassifierFreeGuidance(2.0, 10, channels=None), "noise": noise}
    schedules = [StitchSchedule.from_ratio(ratio) for ratio in (0.0, 0.4, 0.6, 1.0)]
    x_T = noise.latents(small_and_large[0].latent_shape)
    many = sample_many(small_and_large, x_T, y, schedules=schedules, max_batch=3, **settings)
    for schedule, ours in zip(schedules, many, strict=True):
        torch.testing.assert_close(ours, sample(small_and_large, x_T, y, schedule=schedule, **settings), rtol=1e-3, atol=1e-3)


def test_a_slower_denoiser_measures_slower_with_every_solver(small_and_large: list[LatentDenoiser]) -> None:
    x, y = torch.randn(1, 4, 8, 8), torch.tensor([0])

    def slow(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        time.sleep(0.2)
        return small_and_large[0](x, t, y)

    for steps in (1, 2, 5):
        for solver in (PLMS(ldm_diffusion(steps)), DPMSolverPP(ldm_diffusion(steps))):
            own, slowed = measure_step_seconds([small_and_large[0], slow], x, y, solver=solver, repeats=2)
            assert slowed >= own + 0.1
