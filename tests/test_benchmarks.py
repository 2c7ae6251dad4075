"""Benchmarks: what is timed, what is thrown away, what is recorded, what is compared."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_dit
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench, forward, harness, report, sampling, stitch_overhead, sweep, train_speed, unets
from benchmarks.harness import Clocks, Comparison, compare, disturbed, dit_flops, matrix_product, product_flops
from benchmarks.peers import as_denoiser, as_published, diffusers_dit, diffusers_sampler, random_dit
from benchmarks.record import Record, cases_table, machine, read_cases
from dit.inference import prepare_for_inference
from dit.models import DiT
from sit.models import SiT
from tstitch.diffusion import create_diffusion
from tstitch.errors import InputError
from tstitch.guidance import ClassifierFreeGuidance
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule
from tstitch.solvers import DDIM

CPU = torch.device("cpu")
QUICKLY = ["--rounds", "1", "--no-gate", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(harness, "PAUSE", 0.0)


def told_clocks(seconds: list[float], other: list[float]) -> Callable[[], Clocks]:
    """Clocks of samples that last so long while others compute so long."""

    def readings() -> Iterator[Clocks]:
        wall = own = busy = 0.0
        yield Clocks(wall, own, busy)  # compare asks once whether there are clocks
        for lasted, others in zip(seconds, other, strict=True):
            yield Clocks(wall, own, busy)
            wall, own, busy = wall + lasted, own + lasted, busy + lasted + others
            yield Clocks(wall, own, busy)

    return readings().__next__


def test_other_work_disturbs_a_sample_above_an_eighth_of_a_core_and_a_tick() -> None:
    start = Clocks(5.0, 3.0, 40.0)
    assert not disturbed(start, Clocks(6.0, 5.0, 42.1))  # two threads of ours, 0.1 s of others
    assert disturbed(start, Clocks(6.0, 5.0, 42.2))
    assert not disturbed(start, Clocks(5.1, 3.1, 40.12))  # 0.02 s in 0.1 s are above an eighth, but no more than the kernel's tick allows
    assert not disturbed(Clocks(5.0, 3.0, None), Clocks(6.0, 5.0, None))


def test_a_disturbed_sample_is_thrown_away_and_taken_again() -> None:
    clocks = told_clocks([1.0, 9.0, 9.0, 2.0, 1.5, 3.0], [0.0, 5.0, 5.0, 0.0, 0.05, 0.0])
    found = compare({"a": lambda: None, "b": lambda: None}, CPU, rounds=2, clocks=clocks)
    assert found.gated and found.discarded == 2
    assert found.seconds == {"a": [1.0, 1.5], "b": pytest.approx([2.0, 3.0])}


def test_without_the_gate_every_sample_counts() -> None:
    found = compare({"a": lambda: None}, CPU, rounds=2, gate=False, clocks=told_clocks([1.0, 9.0], [0.0, 5.0]))
    assert not found.gated and found.discarded == 0 and found.seconds["a"] == [1.0, 9.0]


def test_a_machine_that_is_never_quiet_is_an_error_and_one_that_becomes_busy_keeps_the_rounds_before(capsys: pytest.CaptureFixture) -> None:
    tries = harness.PATIENCE + 1
    with pytest.raises(InputError, match="--no-gate"):
        compare({"a": lambda: None}, CPU, clocks=told_clocks([1.0] * tries, [1.0] * tries))
    found = compare({"a": lambda: None}, CPU, clocks=told_clocks([2.0] + [1.0] * tries, [0.0] + [1.0] * tries))
    assert found.seconds == {"a": [2.0]} and "stopped after 1 of 7 rounds" in capsys.readouterr().err


def test_variants_take_turns_and_a_sample_repeats_its_call_until_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MIN_SECONDS", 0.1)
    now, calls = 0.0, []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        calls.append(name)

    found = compare({"a": lambda: call("a", 0.03), "b": lambda: call("b", 0.5)}, CPU, rounds=2, clocks=lambda: Clocks(now, now, now))
    assert found.seconds == {"a": pytest.approx([0.03, 0.03]), "b": pytest.approx([0.5, 0.5])}
    turns = "".join(calls)
    assert turns[:2] == "ab" and turns[2:].lstrip("a")[0] == "b" and turns.endswith("aaaab") and turns.count("b") == 3


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    found = Comparison({"ours": [1.0, 4.0, 2.0], "plain": [2.0, 6.0, 5.0]}, reckoned={"half": [0.5, 2.0, 1.0]})
    assert found.speed("ours", "plain") == 2.0 != found.median("plain") / found.median("ours")
    assert found.speed("ours", "half") == 0.5 and found.median("ours") == 2.0


@pytest.mark.parametrize("arguments", [{}, {"patch_size": 4, "learn_sigma": False}, {"posenc": "gta"}, {"mlp_ratio": 3.0, "num_classes": 7}])
def test_flops_by_formula_are_those_that_torch_counts(arguments: dict) -> None:
    model = tiny_dit(0, depth=3, **arguments).bfloat16()  # in bfloat16 attention is made of products that torch counts
    x, t, y = torch.randn(2, *model.latent_shape), torch.tensor([5, 900]), torch.tensor([1, 10 % model.num_classes])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    assert dit_flops(model.config, 2) == counter.get_total_flops()


def test_flops_of_a_fused_attention_are_what_torch_does_not_see_on_a_cpu() -> None:
    model, batch = tiny_dit(0, depth=3), 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(batch, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2]))
    tokens, products = 16, 2
    assert dit_flops(model.config, batch) - counter.get_total_flops() == batch * model.config["depth"] * products * 2 * tokens**2 * 32


def test_a_published_size_has_the_flops_of_its_paper() -> None:
    with torch.device("meta"):
        configs = [random.config for random in (DiT(), SiT())]
    assert [dit_flops(config, 1) / 2 for config in configs] == pytest.approx([118.64e9] * 2, rel=0.005)  # Peebles and Xie 2022, Table 4


def test_the_fraction_of_peak_compares_flops_per_second_within_a_round() -> None:
    ((name, product),) = matrix_product("fp32", torch.float32, CPU).items()
    assert name == "matrix product fp32 2048" and product_flops(name) == 2 * 2048**3 and product().shape == (2048, 2048)
    found = Comparison({name: [1.0, 2.0], "model": [0.5, 1.0]})
    assert found.of_peak("model", product_flops(name) / 4, name) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.05)])
def test_peers_answer_as_the_model_whose_weights_they_have(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_dit(4)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 37, 999]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        exact = model(x, t, y)
        typed = model.to(dtype)
        for peer in (as_denoiser(diffusers_dit(typed)), as_published(typed)):
            out = peer(x, t, y)
            assert out.dtype == torch.float32 and (out - exact).abs().max() < tolerance * exact.abs().max()


def test_diffusers_pipeline_draws_the_same_latents() -> None:
    model = tiny_dit(4, num_classes=1000)
    theirs = diffusers_sampler(model, [3, 900], num_steps=4, cfg_scale=4.0, seed=7)()
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    ours = sample(
        [model], x_T, torch.tensor([3, 900]), schedule=StitchSchedule((1.0,)), solver=DDIM(create_diffusion("ddim4")),
        guidance=ClassifierFreeGuidance(4.0, 1000, channels=None),
    )  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_model_that_diffusers_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="diffusers knows"):
        diffusers_dit(tiny_dit(0, posenc="rope"))


def test_random_models_do_not_answer_zero_and_are_the_same_for_a_seed() -> None:
    a, b, other = (random_dit("emoji-small", seed, input_size=16) for seed in (0, 0, 1))
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.tensor([3])
    assert torch.equal(a(x, t, y), b(x, t, y)) and a(x, t, y).std() > 0.05 and not torch.equal(a(x, t, y), other(x, t, y))


def new_record(path: Path) -> Record:
    return Record("forward", argparse.Namespace(device="cpu", json=path, rounds=2, no_gate=True))


def add_case(record: Record, case: str, ours: float) -> None:
    found = Comparison({"plain": [2.0, 4.0, 2.0], "ours": [ours, ours, ours], "matrix product fp32 2048": [1.0, 1.0, 1.0]}, discarded=3, gated=True)
    record.add(case, found, against={"ours": {"plain": "plain"}}, settings={"batch": 2}, flops={"ours": (1e9, "matrix product fp32 2048")},
               notes={"ours": {"max diff": 1e-7}})  # fmt: skip


def cells(table: str) -> list[list[str]]:
    return [line.strip("| ").replace(" ", "").split("|") for line in table.splitlines()]


def test_a_record_is_read_back_and_keeps_the_cases_that_are_not_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "forward_cpu.json"
    add_case(new_record(path), "one", 1.0)
    add_case(new_record(path), "two", 1.0)
    add_case(new_record(path), "one", 0.5)
    one, two = read_cases(path)
    assert (one["case"], two["case"]) == ("one", "two") and one["discarded"] == 3 and one["gated"] and one["rounds"] == 3
    assert one.items() >= machine(CPU).items() and one["peak_flops_per_s"] == {"matrix product fp32 2048": 2 * 2048**3}
    plain, ours = one["rows"]
    assert plain["seconds"] == statistics.median([2.0, 4.0, 2.0]) and ours["speed"] == {"plain": 4.0} and two["rows"][1]["speed"] == {"plain": 2.0}
    assert ours["flops"] == 1e9 and ours["of_peak"] == pytest.approx(1e9 / 0.5 / (2 * 2048**3)) and ours["of_rounds"] == [0.5] * 3
    table = cases_table([one, two])
    assert ["one", "ours", "0.5", "4.000", "2", "0.12", "1e-07"] in cells(table) and table.count("commit") == 1


def test_a_file_that_is_no_record_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"rows": []}')
    with pytest.raises(InputError, match="no record of a benchmark"):
        new_record(path)
    assert path.read_text() == '{"rows": []}'


def test_the_report_fills_every_place_and_nothing_else(tmp_path: Path) -> None:
    add_case(new_record(tmp_path / "forward_cpu.json"), "one", 1.0)
    text = "# A\n<!-- results: forward -->\nold\n<!-- end -->\nkept\n<!-- results: sweep -->\n<!-- end -->\n"
    filled = report.fill(text, tmp_path)
    assert "old" not in filled and "kept" in filled and cases_table(read_cases(tmp_path / "forward_cpu.json")) in filled
    assert "Not recorded yet: `python benchmarks/sweep.py`." in filled and report.fill(filled, tmp_path) == filled
    with pytest.raises(InputError, match="repair"):
        report.fill("<!-- results: forward -->", tmp_path)


def test_every_quick_form_is_one_that_its_script_takes_and_the_readme_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = report.README.read_text()
    for name, *words in bench.QUICK:
        script = __import__(f"benchmarks.{name}", fromlist=[name])
        assert script.parse_args([*words, "--device", "cpu", "--json", "x.json", "--no-gate"]).no_gate
        assert f"python benchmarks/{name}.py" in readme and f"<!-- results: {name} -->" in readme


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], tuple[int, str]]:
    """Bench --check with a recorded and a measured time of `ours`; its exit code."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "QUICK", [["forward"]])

    def check(recorded: float, measured: float) -> int:
        add_case(new_record(bench.RESULTS / "forward_cpu.json"), "one", recorded)

        def measure(words: list[str], args: argparse.Namespace, path: Path) -> bool:
            add_case(new_record(path), "one", measured)
            return True

        monkeypatch.setattr(bench, "_run", measure)
        before = (bench.RESULTS / "forward_cpu.json").read_bytes()
        try:
            bench.main(["--check", "--device", "cpu"])
        except SystemExit as stopped:
            return stopped.code
        finally:
            assert (bench.RESULTS / "forward_cpu.json").read_bytes() == before
        return 0

    return check


def test_a_check_names_a_fallen_ratio_and_passes_an_equal_or_better_one(checked: Callable, capsys: pytest.CaptureFixture) -> None:
    assert checked(1.0, 1.0) == 0 and "0 of 1 ratios fell" in capsys.readouterr().out
    assert checked(1.0, 1.1) == 0 and checked(1.0, 0.5) == 0
    capsys.readouterr()
    assert checked(1.0, 1.15) == 1
    out = capsys.readouterr().out
    assert ["forward", "one", "ours", "plain", "2.000", "1.739"] in cells(out) and "1 of 1 ratios fell" in out


def test_a_check_names_the_cases_that_nobody_recorded() -> None:
    measured = {"forward": {("one", "ours", "plain"): 1.0, ("two", "ours", "plain"): 1.0}, "sweep": {("three", "tree", "alone"): 2.0}}
    assert bench.unknown({"forward": {("one", "ours", "plain"): 1.0}}, measured) == ["forward: two", "sweep: three"]


def test_a_check_without_a_record_of_this_machine_is_one_sentence(
    checked: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(InputError, match="make bench"):
        bench.main(["--check", "--device", "cpu"])
    assert checked(1.0, 1.0) == 0
    path = bench.RESULTS / "forward_cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text())).replace(machine(CPU)["cpu"], "another CPU"))
    with pytest.raises(InputError, match="nothing was recorded on a cpu machine like this one"):
        bench.main(["--check", "--device", "cpu"])


def test_a_benchmark_that_fails_is_named_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = []
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "QUICK", [["forward", "--rounds", "1"], ["sweep"]])
    monkeypatch.setattr(bench, "_run", lambda words, args, path: run.append(words[0]) or words[0] != "forward")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cpu"])
    assert stopped.value.code == 1 and run == ["forward", "sweep"] and "python benchmarks/forward.py --rounds 1" in capsys.readouterr().err


def cases(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cases"]


def test_the_forward_benchmark_times_all_ways_and_finds_them_equal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "r.json"
    forward.main(["--models", "emoji-small", "--input-size", "8", "--batches", "1", "2", *QUICKLY, "--json", str(path)])
    one, two = cases(path)
    assert [case["case"] for case in (one, two)] == ["emoji-small, batch 1, latents 8", "emoji-small, batch 2, latents 8"]
    rows = {row["variant"]: row for row in one["rows"]}
    assert list(rows) == [f"{way} {dtype}" for dtype in ("fp32", "bf16") for way in ("plain", "published", "diffusers", "ours")]
    assert set(rows["ours bf16"]["speed"]) == {"plain", "published", "plain fp32"} and set(rows["plain fp32"]["speed"]) == {"published"}
    differences = {name: row["notes"]["max diff"] / one["settings"]["output_max"] for name, row in rows.items()}
    assert all(difference < (2e-6 if name.endswith("fp32") else 0.05) for name, difference in differences.items()), differences
    assert all(row["flops"] == dit_flops(random_dit("emoji-small", input_size=8).config, 1) and row["of_peak"] > 0 for row in rows.values())
    assert set(one["peak_flops_per_s"]) == {"matrix product fp32 2048", "matrix product bf16 2048"} and "of peak" in capsys.readouterr().out


@pytest.mark.parametrize("models", [["emoji-small", "emoji-large"], ["emoji-small", "emoji-base", "emoji-large"]])
def test_the_sweep_benchmark_samples_the_same_pictures_in_fewer_evaluations(models: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    sweep.main(["--models", *models, "--parts", "2", "--num-steps", "2", "--cfg-scale", "2", *QUICKLY, "--json", str(path)])
    plain, ours, bf16 = cases(path)[0]["rows"]
    assert [row["variant"] for row in (plain, ours, bf16)] == ["plain fp32", "ours fp32", "ours bf16"]
    assert ours["notes"]["max diff"] < 1e-5 < bf16["notes"]["max diff"] < 0.25
    assert plain["notes"]["evaluations"] == {2: 6, 3: 12}[len(models)] > ours["notes"]["evaluations"]


def test_the_sampling_benchmark_agrees_with_the_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    sampling.main(["--models", "emoji-small", "--input-size", "8", "--batch", "1", "--num-steps", "2", *QUICKLY, "--json", str(path)])
    rows = {row["variant"]: row for row in cases(path)[0]["rows"]}
    assert rows["plain fp32"]["notes"]["max diff"] < 1e-4 and rows["ours fp32"]["notes"]["max diff"] < 1e-4
    assert set(rows["ours bf16"]["speed"]) == {"diffusers"} and rows["diffusers fp32"]["speed"] == {}


def test_the_unet_benchmark_switches_and_the_pictures_stay(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    unets.main(["--batch", "1", "--num-steps", "2", "--switches", "channels-last, fused projections", *QUICKLY, "--json", str(path)])
    found = {case["case"].split(",")[0]: {row["variant"]: row["notes"]["max diff"] for row in case["rows"]} for case in cases(path)}
    assert list(found) == ["ldm", "ldm-ratios", "sd", "pipeline", "decode"]
    assert found["pipeline"].pop("ours, ratio 0") == 0 and found["pipeline"].pop("ours, ratio 0.5") > 0.01
    assert all(difference < 1e-3 for case in found.values() for difference in case.values()), found


def test_the_overhead_benchmark_compares_ratios_with_the_models_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    stitch_overhead.main(["--ratios", "0.5", "--num-images", "1", "--num-sampling-steps", "2", *QUICKLY, "--json", str(path)])
    rows = {row["variant"]: row for row in cases(path)[0]["rows"]}
    assert list(rows) == ["ratio 1", "ratio 0.5", "ratio 0"] and rows["ratio 1"]["speed"]["ideal"] == rows["ratio 0"]["speed"]["ideal"] == 1
    ideal = (rows["ratio 1"]["seconds"] + rows["ratio 0"]["seconds"]) / 2
    assert rows["ratio 0.5"]["speed"]["ideal"] == pytest.approx(ideal / rows["ratio 0.5"]["seconds"])


@pytest.mark.slow
def test_the_training_benchmark_times_and_weighs_every_variant(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    train_speed.main(["--model", "emoji-small", "--batch-size", "2", "--image-size", "32", *QUICKLY, "--json", str(path)])
    rows = cases(path)[0]["rows"]
    assert len(rows) == 8 and rows[0]["variant"] == "plain" and all(row["notes"]["peak MiB"] > 0 for row in rows)


def test_prepared_and_plain_models_are_told_apart_by_the_benchmarks() -> None:
    # Every variant must be what its name says: a benchmark of a model against itself would pass all other tests.
    ways = forward.variants(tiny_dit(0), compiled=False)
    assert isinstance(ways["plain"], DiT) and isinstance(ways["ours"], type(prepare_for_inference(tiny_dit(0)))) and len(set(map(id, ways.values()))) == 4
