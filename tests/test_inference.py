"""Models made ready for sampling are the same functions as the models that they were made of."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import dit.inference
from dit.checkpoints import load_denoisers
from dit.inference import Modulations, PackedLinear, PlainLinear, can_pack, prepare_for_inference
from dit.models import DiT
from sit.models import SiT
from tstitch.compiled import Compiled
from tstitch.diffusion import create_diffusion
from tstitch.noise import SampleNoise
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import SOLVERS, create_solver

X, T, Y = torch.randn(6, 4, 8, 8), torch.full((6,), 500), torch.tensor([1, 2, 1, 10, 10, 2])
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tiny(kind: type[DiT] = DiT, **arguments: object) -> DiT:
    """A model that does not answer 0, as an untrained one would."""
    torch.manual_seed(0)
    model = kind(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10, **arguments).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def answer(model: torch.nn.Module, t: Tensor = T, y: Tensor = Y) -> Tensor:
    with torch.no_grad():
        return model(X, t, y)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [DiT, SiT])
@pytest.mark.parametrize("posenc", ["abs", "rope", "gta"])
def test_a_prepared_model_is_the_same_function(posenc: str, kind: type[DiT], dtype: torch.dtype) -> None:
    model = tiny(kind, posenc=posenc)
    exact, model = answer(model), model.to(dtype)
    plain = answer(model)
    for timesteps in ((), (500, 20)):
        prepared = answer(prepare_for_inference(model, timesteps))
        assert prepared.shape == plain.shape and prepared.dtype == X.dtype
        assert (prepared - exact).abs().max() < TOLERANCE[dtype]
        assert (prepared - plain).abs().max() < TOLERANCE[dtype]


def test_the_plain_layers_stay_where_the_private_operators_are_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny(), answer(tiny())

    class Missing:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(name)

    class Wrong:
        _is_mkldnn_bf16_supported = staticmethod(lambda: True)
        _reorder_linear_weight = staticmethod(lambda weight: weight)
        _linear_pointwise = staticmethod(lambda x, weight, bias, *end: x @ weight.T)  # forgets the bias and the GELU

    for operators in (Missing(), Wrong()):
        monkeypatch.setattr(torch.ops, "mkldnn", operators)
        can_pack.cache_clear()
        assert not can_pack(torch.float32) and not can_pack(torch.bfloat16)
        prepared = prepare_for_inference(model)
        assert isinstance(prepared.last, PlainLinear)
        assert (answer(prepared) - plain).abs().max() < 2e-6
    monkeypatch.undo()
    can_pack.cache_clear()


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch or processor packs no layers")
def test_a_prepared_model_does_not_hold_what_it_packed() -> None:
    model = tiny()
    prepared = prepare_for_inference(model)
    assert isinstance(prepared.last, PackedLinear)
    weights = [weakref.ref(block.mlp.fc1.weight) for block in model.blocks] + [weakref.ref(model.blocks[0].adaLN_modulation[-1].weight)]
    del model
    assert not any(weight() is not None for weight in weights)
    answer(prepared)


def test_kept_modulations_have_the_same_bits_in_any_company_and_order() -> None:
    model, times = tiny(), (500, 20, 3)
    alone, together = Modulations(model, times), Modulations(model, times)
    with torch.no_grad():
        together(torch.tensor([3, 3, 3]), torch.tensor([9, 7, 10]))
        both = together(torch.tensor([500, 500]), torch.tensor([7, 4]))
        assert torch.equal(alone(torch.tensor([500]), torch.tensor([4]))[0], both[1])
        assert torch.equal(alone(torch.tensor([500]), torch.tensor([7]))[0], both[0])
        assert torch.allclose(both, Modulations(model)(torch.tensor([500, 500]), torch.tensor([7, 4])), atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_walks_a_prepared_model_as_it_walks_the_plain_one(name: str) -> None:
    model, noise = tiny(), SampleNoise(range(2))
    solver = create_solver(name, create_diffusion("6"))
    x, y = noise.latents((4, 8, 8)), torch.tensor([1, 7])
    walked = [
        sample([denoiser], x, y, schedule=StitchSchedule((1.0,)), solver=solver, noise=noise)
        for denoiser in (model, prepare_for_inference(model, solver.timesteps))
    ]
    assert torch.allclose(*walked, atol=1e-4)


def test_rows_belong_to_their_samples_and_equal_pairs_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    modulations, rows = Modulations(tiny()), []
    compute = modulations.compute
    monkeypatch.setattr(modulations, "compute", lambda t, y: rows.append(len(t)) or compute(t, y))
    t, y = torch.tensor([5, 5, 9, 5, 9]), torch.tensor([1, 2, 1, 1, 1])
    with torch.no_grad():
        found = modulations(t, y)
        for i in range(5):
            assert torch.allclose(found[i], compute(t[i : i + 1], y[i : i + 1])[0], atol=1e-6)
    assert rows == [3]


def test_kept_modulations_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, times = tiny(), (500, 20)
    of_a_label = 4 * len(times) * len(Modulations(model).weight)
    monkeypatch.setattr(dit.inference, "KEPT_BYTES", 2 * of_a_label)
    modulations = Modulations(model, times)
    with torch.no_grad():
        for label in (1, 2, 3, 1):
            modulations(torch.tensor([20, 20]), torch.tensor([label, 10]))
            assert len(modulations.kept) <= 2 and {label, 10} == set(modulations.kept)
        crowd = torch.arange(5)
        assert torch.allclose(modulations(torch.full((5,), 20), crowd), Modulations(model)(torch.full((5,), 20), crowd), atol=1e-6)
        assert len(modulations.kept) == 2  # a crowd that does not fit is not kept


def test_x_is_not_changed() -> None:
    before = X.clone()
    answer(prepare_for_inference(tiny()))
    assert torch.equal(X, before)


@pytest.mark.parametrize(("dtype", "error", "warned"), [
    (torch.float32, 1e-6, False), (torch.float32, 1e-3, True), (torch.bfloat16, 2**-6, False), (torch.bfloat16, 0.2, True), (torch.float16, 0.05, True),
])  # fmt: skip
def test_what_was_compiled_is_compared_with_the_function(
    dtype: torch.dtype, error: float, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls: list[int] = []

    def compile_wrongly(function: Callable, **how: object) -> Callable:
        return lambda given: calls.append(len(given)) or function(given) + error

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    doubled = Compiled(lambda x: 2 * x, torch.device("cpu"), dtype)
    for x in (torch.ones(2), torch.ones(2), torch.ones(3)):
        answer = doubled(x.to(dtype))
        assert torch.allclose(answer, 2 * x.to(dtype), atol=0 if warned else 1.1 * error)
    assert ("run uncompiled" in capsys.readouterr().err) == warned
    assert calls == ([2] if warned else [2, 2, 3])


def test_two_threads_may_call_one_model() -> None:
    modulations = Modulations(tiny(), (500, 20))
    alone = [Modulations(tiny(), (500, 20))(torch.tensor([500]), torch.tensor([label])) for label in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with torch.no_grad(), ThreadPoolExecutor(4) as threads:

            def ask(label: int) -> bool:
                with torch.no_grad():
                    modulations.kept = {}
                    return torch.equal(modulations(torch.tensor([500]), torch.tensor([label])), alone[label])

            assert all(threads.map(ask, [k % 4 for k in range(2000)]))
    finally:
        sys.setswitchinterval(before)


def test_making_a_model_ready_draws_nothing() -> None:
    model = tiny()
    can_pack.cache_clear()
    before = torch.get_rng_state()
    prepare_for_inference(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_compiled_model_is_the_same_function() -> None:
    model = tiny()
    prepared = prepare_for_inference(copy.deepcopy(model), (500,), compile=True)
    assert (answer(prepared) - answer(model)).abs().max() < 2e-6
    assert prepared.compiled.compiled is not prepared.compiled.function


def test_scripts_sample_with_prepared_models() -> None:
    from dit.sample_t_stitch import parse_args  # noqa: PLC0415
    from tstitch.cli import sampling_plan  # noqa: PLC0415

    plan = sampling_plan(parse_args(["--preset", "emoji", "--num-images", "1", "--num-sampling-steps", "2"]))
    (small,) = load_denoisers(plan, plan.preset.denoisers[:1])
    assert list(small.modulations.timesteps) == list(map(float, plan.solver.timesteps))
