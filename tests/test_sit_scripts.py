"""The SiT scripts as a user runs them, on the emoji autoencoder and tiny models: pictures, kills, ranks, sweeps, training, and what a file says of its flow."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import redraw_weights
from PIL import Image

from dit.checkpoints import load_dit
from dit.models import DiT
from sit import checkpoints, plot_sweeps, sample, sample_ddp, sample_t_stitch, sweep_emoji, train
from sit.bridge import Bridge
from sit.checkpoints import is_dit, load_flows, load_sit, mark_dits, said_by
from sit.cli import equation_from, transport_words
from sit.flows import ODEWalker
from sit.models import SiT, SiT_models
from sit.transport import DIFFUSION_FORMS, LAST_STEPS, ODE, SDE, create_transport
from sit.transport.ode import ADAPTIVE
from tstitch import generate
from tstitch.checkpoints import read_checkpoint, read_weights, save_weights
from tstitch.checkpoints.convert import convert
from tstitch.cli import sampling_plan
from tstitch.data import write_features
from tstitch.errors import InputError
from tstitch.presets import ROOT, SIT_PRESETS, DenoiserFile
from tstitch.schedule import two_way_ratios

TINY = {
    "emoji-small": {"patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 4},
    "emoji-large": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 4},
}
FEW = ["--preset", "emoji", "--device", "cpu", "--class-labels", "0", "8"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of six items, as large as the emoji latents."""
    moments = np.random.default_rng(0).standard_normal((6, 1, 8, 16, 16)).astype(np.float32)
    write_features(folder := tmp_path_factory.mktemp("store"), moments, np.arange(6), num_classes=9, vae="none", scaling_factor=1.0)
    return folder


@pytest.fixture
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled models' names, for tiny ones."""
    for name, size in TINY.items():
        monkeypatch.setitem(checkpoints.SIT_CONFIGS, name, partial(SiT, **size))


@pytest.fixture
def weights(tmp_path: Path, tiny_sizes: None) -> list[str]:
    """Flags of a small and a large model under the preset's names."""
    flags = []
    for seed, (flag, size) in enumerate(zip(("--s_ckpt", "--xl_ckpt"), TINY.values(), strict=True)):
        model = redraw_weights(SiT(input_size=16, num_classes=9, **size), seed, 0.05)
        path = tmp_path / f"{flag[2:]}.safetensors"
        save_weights(path, model.state_dict(), model.config | transport_words(create_transport()), torch.float32)
        flags += [flag, str(path)]
    return flags


def test_what_a_file_does_not_say_is_the_command_line_s_or_published(weights: list[str]) -> None:
    """A bare state dict beside a model of another flow is carried over from the published flow, not taken for that other one."""
    bare = Path(weights[1]).with_name("bare.pt")
    torch.save(load_sit(weights[1]).state_dict(), bare)
    files = [DenoiserFile("S", "emoji-small", bare), DenoiserFile("L", "emoji-large", Path(weights[3]))]
    args = sample_t_stitch.parse_args(["ODE", *FEW])
    plan = replace(sampling_plan(args, presets=SIT_PRESETS, diffusion=False), walker=ODEWalker(ODE(create_transport("GVP", "noise"), "euler")))
    small, large = load_flows(plan, files)
    assert isinstance(small, Bridge) and (small.process.transport.name, small.process.transport.prediction) == ("Linear", "velocity")
    assert isinstance(large, Bridge)  # which says that it is of the Linear path
    assert isinstance(load_flows(plan, files[:1], {"path_type": "GVP", "prediction": "noise"}, prepare=False)[0], SiT)


def test_a_dit_is_known_by_what_it_says_or_by_the_flag(tmp_path: Path) -> None:
    dit = redraw_weights(DiT(input_size=16, patch_size=8, hidden_size=384, depth=1, num_heads=6, num_classes=9), 1)
    torch.save(
        {"ema": dit.state_dict(), "model": dit.state_dict(), "opt": {}, "args": argparse.Namespace(model="DiT-S/8", num_classes=9)}, tmp_path / "fast.pt"
    )
    torch.save(dit.state_dict(), tmp_path / "bare.pt")
    assert is_dit(read_checkpoint(tmp_path / "fast.pt")) and not is_dit(read_checkpoint(tmp_path / "bare.pt"))
    with pytest.raises(InputError, match="was trained as a DiT"):
        load_sit(tmp_path / "fast.pt")
    plan = sampling_plan(sample_t_stitch.parse_args(["ODE", *FEW]), presets=SIT_PRESETS, diffusion=False)
    plan = replace(plan, walker=ODEWalker(ODE(create_transport(), "euler")))
    args = sample_t_stitch.parse_args(["ODE", "--dit", "s"])
    files = mark_dits(args, [DenoiserFile("S", "emoji-small", tmp_path / "bare.pt"), DenoiserFile("L", "emoji-large", tmp_path / "fast.pt")])
    assert all(isinstance(model, Bridge) and type(model.model) is DiT for model in load_flows(plan, files, prepare=False))


@pytest.mark.parametrize("equation", [["ODE"], ["ODE", "--sampling-method", "heun2"], ["SDE"]], ids=" ".join)
def test_all_tradeoffs_of_a_flow_make_a_grid_and_eleven_rows(weights: list[str], tmp_path: Path, equation: list[str]) -> None:
    sample_t_stitch.main([*equation, *FEW, *weights, "--all_tradeoffs", "--num-sampling-steps", "4", "--save_dir", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["rows"]) == 11
    assert Image.open(tmp_path / "out" / "grid.png").width > 600
    assert results["settings"]["solver"].startswith(equation[0]) and results["settings"]["path"] == "Linear"
    first, last = results["rows"][0], results["rows"][-1]
    assert first["evaluations"][0] == last["evaluations"][1] == 0 < first["evaluations"][1]
    assert first["speed_up"] == 1


@pytest.mark.parametrize("equation", [["ODE"], ["ODE", "--reverse", "--sampling-method", "rk4"], ["SDE", "--last-step", "Tweedie"]], ids=" ".join)
def test_one_model_makes_pictures_and_says_what_they_cost(weights: list[str], tmp_path: Path, equation: list[str]) -> None:
    arguments = [*equation, *FEW, "--model", "emoji-large", "--ckpt", weights[3], "--num-sampling-steps", "4"]
    sample.main([*arguments, "--save_dir", str(tmp_path / "one")])
    record = json.loads((tmp_path / "one" / "sample.json").read_text())
    assert record["evaluations"] > 0 and Image.open(tmp_path / "one" / "sample.png").width > 100


@pytest.mark.parametrize("ratios", [[], ["--ratios", "0", "0.5"]], ids=["one model", "stitched"])
@pytest.mark.parametrize("equation", ["ODE", "SDE"])
def test_the_generator_writes_the_same_bytes_whatever_was_cut_off(
    weights: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equation: str, ratios: list[str]
) -> None:
    models = [*weights, *ratios] if ratios else ["--model", "emoji-large", "--ckpt", weights[3]]
    arguments = [equation, *FEW[:4], *models, "--num-fid-samples", "5", "--per-proc-batch-size", "2", "--num-sampling-steps", "4", "--sample-dir"]
    sample_ddp.main([*arguments, str(tmp_path / "whole")])
    walk, calls = generate.walk, []

    def dies_at_the_third_chunk(*given: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return walk(*given)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "walk", dies_at_the_third_chunk)
        with pytest.raises(KeyboardInterrupt):
            sample_ddp.main([*arguments, str(tmp_path / "cut")])
    sample_ddp.main([*arguments, str(tmp_path / "cut")])
    written = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(written) == (5 if ratios else 3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == written


@pytest.mark.parametrize("equation", ["ODE", "SDE"])
def test_one_rank_and_three_ranks_write_the_same_bytes(tmp_path: Path, equation: str) -> None:
    model = redraw_weights(SiT_models["SiT-S/8"](input_size=16, num_classes=9), 1, 0.02)
    save_weights(tmp_path / "weights.safetensors", model.state_dict(), model.config | transport_words(create_transport()))
    arguments = [
        "sit/sample_ddp.py", equation, *FEW[:4], "--model", "SiT-S/8", "--ckpt", str(tmp_path / "weights.safetensors"), "--num-fid-samples", "7",
        "--per-proc-batch-size", "2", "--num-sampling-steps", "3", "--cfg-scale", "2", "--sample-dir",
    ]  # fmt: skip
    written = []
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *arguments, str(folder)], cwd=ROOT, check=True, capture_output=True, env=environment)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1] and "SiT-S-8.npz" in written[0]
    pictures = np.load(tmp_path / "1" / "SiT-S-8.npz")["arr_0"]
    assert pictures.shape == (7, 64, 64, 3) and pictures.std() > 5


def test_a_sweep_of_a_flow_has_a_row_for_each_ratio(weights: list[str], tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    sweep_emoji.main([
        "ODE", *weights, "--device", "cpu", "--num-images", "4", "--chunk", "2", "--num-sampling-steps", "4", "--out", str(out),
        "--work-dir", str(tmp_path / "w"),
    ])  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == [schedule.describe(["S", "L"]) for schedule in two_way_ratios()]
    assert all(row["fd_emoji"] > 0 and sum(row["evaluations"]) > 0 for row in rows)
    assert out.with_suffix(".png").exists()


def test_a_small_dit_is_carried_over_to_the_large_sit_s_flow(weights: list[str], tmp_path: Path) -> None:
    dit = ROOT / "pretrained_models" / "emoji" / "dit-small.safetensors"
    arguments = ["ODE", *FEW, "--sampling-method", "euler", "--s_ckpt", str(dit), *weights[2:], "--ratio", "0.5", "--num-sampling-steps", "5"]
    sample_t_stitch.main([*arguments, "--save_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["evaluations"] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ODE", "--diffusion-form", "SBDM"], "--diffusion-form belong to the SDE"),
        (["SDE", "--rtol", "1e-4"], "--rtol belong to the ODE"),
        (["SDE", "--diffusion-form", "SBDM"], "--sample-eps above 0"),
        (["ODE", "--sampling-method", "heun"], "unknown --sampling-method 'heun' of an ODE"),
        (["SDE", "--sampling-method", "dopri5"], "unknown --sampling-method 'dopri5' of an SDE"),
        (["ODE", "--path-type", "VP"], "was trained with --path-type Linear, not VP"),
        (["ODE", "--prediction", "noise"], "was trained with --prediction velocity, not noise"),
        (["ODE", "--num-sampling-steps", "1"], "at least 2 times"),
        (["SDE", "--last-step-size", "0"], "pass --last-step None"),
        (["ODE", "--three_combo", "0.2", "0.2", "0.6"], "has no base model"),
        (["ODE", "--atol", "0"], "must be above 0"),
        (["ODE", "--sampling-method", "euler", "--rtol", "1e-9"], "decide nothing in euler"),
        (["SDE", "--diffusion-norm", "inf"], "--diffusion-norm must be a number"),
        (["SDE", "--last-step", "None", "--last-step-size", "0.3"], "leave --last-step-size out"),
        (["ODE", "--b_ckpt", "nowhere.pt"], "--b_ckpt is the middle one of three models"),
    ],
)
def test_what_cannot_be_walked_is_refused_with_the_flag_to_mend(weights: list[str], tmp_path: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        sample_t_stitch.main([*arguments, *FEW, *weights, "--save_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_unknown_name_is_refused_as_by_the_dit_scripts_and_a_base_model_needs_none(weights: list[str], tmp_path: Path) -> None:
    few = [*FEW, "--sampling-method", "euler", "--num-sampling-steps", "5"]  # which are 4 intervals
    with pytest.raises(InputError, match="unknown model 'emoji-smal'; choose from .*emoji-small"):
        sample.main(["ODE", *few, "--model", "emoji-smal", "--ckpt", weights[1], "--save_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match="unknown model 'emoji-smal'"):
        load_sit(weights[1], "emoji-smal")
    assert not (tmp_path / "out").exists()
    three = [*weights, "--b_ckpt", weights[1], "--three_combo", "0.25", "0.25", "0.5"]
    sample_t_stitch.main(["ODE", *few, *three, "--save_dir", str(tmp_path / "three")])
    assert json.loads((tmp_path / "three" / "results.json").read_text())["rows"][0]["evaluations"] == [1, 1, 2]


def test_weights_that_are_not_finite_leave_no_sample_file_to_measure(weights: list[str], tmp_path: Path) -> None:
    tensors, config = read_weights(weights[3])
    tensors["final_layer.linear.bias"][0] = float("nan")
    save_weights(tmp_path / "nan.safetensors", tensors, config)
    few = ["ODE", *FEW[:4], "--num-sampling-steps", "2", "--sampling-method", "euler"]
    with pytest.raises(InputError, match="the samples are not finite"):
        sample_ddp.main([
            *few, "--model", "emoji-large", "--ckpt", str(tmp_path / "nan.safetensors"), "--num-fid-samples", "3", "--per-proc-batch-size", "2",
            "--sample-dir", str(tmp_path / "samples"),
        ])  # fmt: skip
    assert not list((tmp_path / "samples").glob("*.npz"))


def test_every_choice_of_the_command_line_makes_its_equation(weights: list[str]) -> None:
    """All methods, forms, last steps and predictions, as words; which of them are finite is the transport's own test."""
    for method in ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams", *ADAPTIVE):
        args = sample_t_stitch.parse_args(["ODE", "--sampling-method", method])
        assert isinstance(equation_from(args, create_transport(), 5), ODE)
    for form in DIFFUSION_FORMS:
        for last_step in LAST_STEPS:
            args = sample_t_stitch.parse_args(["SDE", "--diffusion-form", form, "--last-step", last_step, "--diffusion-norm", "0.5"])
            assert isinstance(equation_from(args, create_transport(sample_eps=1e-3), 5), SDE)


def test_a_trained_sit_is_sampled_as_what_it_was_trained_for(store: Path, tmp_path: Path, tiny_sizes: None) -> None:
    """Training checkpoint and export both say their flow, so that sampling needs no flags; the published samplers could not read their own trainer's."""
    flow = ["--path-type", "GVP", "--prediction", "noise", "--loss-weight", "velocity", "--sample-eps", "0.01"]
    run = ["--features-path", str(store), "--model", "emoji-large", "--max-steps", "2", "--global-batch-size", "4", "--num-classes", "9"]
    train.main([*run, *flow, "--results-dir", str(tmp_path / "run"), "--export", str(tmp_path / "out.safetensors")])
    for path in (tmp_path / "out.safetensors", tmp_path / "run" / "checkpoints" / "0000002.pt"):
        said = said_by(read_checkpoint(path))
        assert said == {"path_type": "GVP", "prediction": "noise", "loss_weight": "velocity", "train_eps": 1e-3, "sample_eps": 0.01}
        assert load_sit(path).latent_shape == (4, 16, 16)
        sample.main(["ODE", *FEW, "--model", "emoji-large", "--ckpt", str(path), "--sampling-method", "euler", "--save_dir", str(tmp_path / "s")])
        assert json.loads((tmp_path / "s" / "sample.json").read_text())["settings"]["path"] == "GVP"
    with pytest.raises(InputError, match="was trained as a SiT"):
        load_dit(tmp_path / "out.safetensors")
    convert(path, tmp_path / "converted.safetensors")
    assert said_by(read_checkpoint(tmp_path / "converted.safetensors")) == said
    with pytest.raises(InputError, match="was trained with --path-type GVP, not Linear"):
        train.main([*run, "--path-type", "Linear", "--ckpt", str(path), "--results-dir", str(tmp_path / "other")])
    train.main([*run, "--ckpt", str(path), "--results-dir", str(tmp_path / "next")])
    path.unlink()  # a run does not need the file that it began with again
    train.main([*run, "--ckpt", str(path), "--results-dir", str(tmp_path / "next"), "--autoresume"])
    train.main([*run, "--init-from", str(tmp_path / "out.safetensors"), "--results-dir", str(tmp_path / "fine")])
    assert json.loads((tmp_path / "fine" / "config.json").read_text())["prediction"] == "noise"
    assert json.loads((tmp_path / "next" / "config.json").read_text())["path_type"] == "GVP"


def test_a_bare_sit_is_converted_to_one_that_says_so(weights: list[str], tmp_path: Path) -> None:
    bare, out = tmp_path / "bare.pt", tmp_path / "out.safetensors"
    torch.save(load_sit(weights[1]).state_dict(), bare)
    assert any("pass --kind" in note for note in convert(bare, out, num_heads=4).notes)
    assert is_dit(read_checkpoint(out))
    assert not any("--kind" in note for note in convert(bare, out, kind="SiT", num_heads=4).notes)
    assert said_by(read_checkpoint(out)) == {"path_type": "Linear", "prediction": "velocity"}
    assert load_sit(out).latent_shape == (4, 16, 16)
    with pytest.raises(InputError, match="leave --kind out"):
        convert(out, tmp_path / "again.safetensors", kind="DiT")


def test_sweeps_side_by_side_make_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    keys = ("name", "evaluations", "seconds_per_image", "sampling_speed_up", "fd_emoji", "fd_relative", "fd_emoji_held_out")
    rows = [dict(zip(keys, values, strict=True)) for values in (("L:100", [0, 20], 2.0, 1.0, 3.0, 0.0, 4.0), ("S:100", [20, 0], 0.5, 4.0, 4.5, 0.5, 5.0))]
    paths = []
    for k, solver in enumerate(("ODE heun2", "SDE Euler", "ODE dopri5")):
        paths.append(tmp_path / f"{k}.json")
        result = {"settings": {"solver": solver}, "models": {"S": "s", "L": "l"}, "num_images": 100 if k < 2 else 50, "rows": rows}
        paths[-1].write_text(json.dumps(result))
    for x in ("seconds", "evaluations"):
        plot_sweeps.main([*map(str, paths[:2]), "--x", x, "--out", str(tmp_path / f"{x}.png")])
        assert Image.open(tmp_path / f"{x}.png").width > 300
    said = capsys.readouterr().out
    assert len(re.findall(r"\| +L:100 \|", said)) == 4 and "+50.0 %" in said and "SDE Euler, 20 evaluations: s + l" in said
    with pytest.raises(InputError, match="50, 100"):
        plot_sweeps.main([*map(str, paths), "--out", str(tmp_path / "no.png")])


def test_a_run_is_watched_as_the_flow_that_it_trains(store: Path, tmp_path: Path, tiny_sizes: None) -> None:
    vae = ROOT / "pretrained_models" / "emoji" / "vae"
    train.main([
        "--features-path", str(store), "--model", "emoji-small", "--max-steps", "2", "--global-batch-size", "4", "--num-classes", "9", "--results-dir",
        str(tmp_path), "--sample-every", "2", "--eval-images", "4", "--eval-extractor", "emoji", "--vae", str(vae), "--cfg-scale", "1",
        "--eval-num-sampling-steps", "2",
    ])  # fmt: skip
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["fd_emoji"] > 0
    assert Image.open(tmp_path / "previews" / "0000002.png").width > 300


def test_a_model_of_pixels_is_trained_and_sampled(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for k, picture in enumerate(pictures):
        (tmp_path / "data" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "data" / str(k % 2) / f"{k}.png")
    out = tmp_path / "pixels.safetensors"
    words = ["--model", "SiT-S/8", "--vae", "none", "--image-size", "8"]
    train.main([
        *words, "--data-path", str(tmp_path / "data"), "--max-steps", "1", "--global-batch-size", "2", "--results-dir", str(tmp_path / "run"),
        "--export", str(out),
    ])  # fmt: skip
    arguments = ["ODE", *words, "--ckpt", str(out), "--num-classes", "2", "--class-labels", "1", "--sampling-method", "euler", "--num-sampling-steps", "3"]
    sample.main([*arguments, "--device", "cpu", "--save_dir", str(tmp_path / "s")])
    assert Image.open(tmp_path / "s" / "sample.png").width > 50
