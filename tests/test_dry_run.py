"""--dry-run says what a run will cost and writes nothing; --help groups its flags, explains each and shows its default."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sd_tiny import save_tiny_pair, tiny_controlnet, tiny_unet
from torch import nn

from dit import extract_features, sample, sample_ddp, sample_ddp_t_stitch, sample_t_stitch, sweep_emoji
from dit import train as dit_train
from ldm.scripts import sample_imagenet_32_t_stitch, sample_imagenet_ddp_t_stitch
from sd import sd_demo, sdxl_canny, train_sdxl_tstitch, train_text_to_image
from sd import sweep_emoji as sd_sweep
from sit import sample as sit_sample
from sit import sample_ddp as sit_sample_ddp
from sit import sample_t_stitch as sit_stitch
from sit import sweep_emoji as sit_sweep
from sit import train as sit_train
from tstitch import dry_run, generate, training_cli
from tstitch.autoencoder import Autoencoder
from tstitch.cli import run
from tstitch.data import write_features
from tstitch.dry_run import (
    Files,
    count_flops,
    disk_lines,
    flop_counter,
    module_bytes,
    plan_sampling,
    plan_training,
    show_bytes,
    show_flops,
    show_plan,
    show_seconds,
)
from tstitch.presets import ROOT
from tstitch.training_cli import training_plan

SCRIPTS = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for folder in ("dit", "sit", "ldm", "ldm/scripts", "sd")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "\n    run(main)" in path.read_text()
]
QUICK_ANYWAY = {"dit.evaluator", "ldm.evaluator", "dit.plot_runs", "sit.plot_sweeps", "dit.similarity", "dit.visualize_sampling_freq", "sd.gradio_demo"}
NO_PLAN = QUICK_ANYWAY | {"dit.tune", "sit.tune", "ldm.scripts.tune"}  # a tuner's answer is a plan
EMOJI = ["--preset", "emoji", "--device", "cpu", "--dry-run"]
QUICK = [*EMOJI, "--num-sampling-steps", "5"]


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    made: list[argparse.ArgumentParser] = []

    def watched(self: argparse.ArgumentParser, *arguments: object, **more: object) -> None:
        made.append(self)
        raise SystemExit

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, watched)
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args([])
    return made[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_groups_every_flag_explains_it_and_shows_its_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(name, monkeypatch)
    formatter = parser._get_formatter()
    ungrouped = [action.option_strings for action in parser._optionals._group_actions if action.option_strings != ["-h", "--help"]]
    assert not ungrouped
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    assert len(shown) > 3
    for action in shown:
        assert action.help and len(action.help) >= 10, action.option_strings
        said = formatter._expand_help(action)
        assert action.default in (None, argparse.SUPPRESS) or not action.option_strings or "default" in said, action.option_strings
    assert ("--dry-run" in parser._option_string_actions) == (name not in NO_PLAN)


def test_every_script_is_looked_at() -> None:
    assert len(SCRIPTS) >= 30 and {"dit.sample", "ldm.main", "sd.sd_demo", "sit.train"} <= set(SCRIPTS)


def everything_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def number(text: str) -> float:
    """What `show_flops` and `show_bytes` wrote."""
    value, unit = re.match(r"(?:at most )?([\d.e+]+) ([kKMGTPE]?)(?:FLOP|B)", text).groups()
    return float(value) * 1000 ** "_KMGTPE".index(unit.upper() or "_")


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[str]]]:
    """Runs a script and gives the lines that it printed, by name; nothing may appear in the current folder."""
    monkeypatch.chdir(tmp_path)

    def plan(main: Callable[[list[str]], None], *arguments: str) -> dict[str, list[str]]:
        before = everything_in(tmp_path)
        main(list(arguments))
        assert everything_in(tmp_path) == before
        lines: dict[str, list[str]] = {}
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1].startswith("dry run: nothing was written")
        for line in printed[:-1]:
            if re.match(r"\S+ +\S", line):
                name = line.split()[0]
            lines.setdefault(name, []).append(line.strip().removeprefix(name).strip())
        assert {"FLOPs", "time", "memory", "disk"} <= lines.keys()
        return lines

    return plan


def flops_of_run(main: Callable[[list[str]], None], *arguments: str) -> float:
    """What torch counts in a real run, told of what it does not see on a CPU."""
    with flop_counter() as counter:
        main([word for word in arguments if word != "--dry-run"])
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (sample, ["--class-labels", "0", "8"]),
        (sample, ["--class-labels", "3", "--cfg-scale", "1", "--solver", "ddpm"]),
        (sample_t_stitch, ["--ratio", "0.4", "--class-labels", "1", "2"]),
        (sample_t_stitch, ["--three_combo", "0.4", "0.2", "0.4", "--class-labels", "1"]),
        (sit_sample, ["ODE", "--sampling-method", "heun2", "--class-labels", "1", "2"]),
        (sit_stitch, ["SDE", "--ratio", "0.5", "--class-labels", "1"]),
        (sit_stitch, ["ODE", "--ratio", "0.5", "--class-labels", "1"]),
        (sample_imagenet_32_t_stitch, ["--ratio", "0.5", "--class-labels", "1", "--cfg-scale", "3"]),
        (sample_imagenet_32_t_stitch, ["--ratio", "0.5", "--class-labels", "1", "--uncond", "random", "--solver", "plms"]),
    ],
)
def test_flops_and_evaluations_are_those_of_the_run(planned: Callable, tmp_path: Path, script: object, words: list[str]) -> None:
    said = planned(script.main, *words, *QUICK)
    flops = flops_of_run(script.main, *words, *QUICK, "--save_dir", "out")
    assert number(said["FLOPs"][0]) == pytest.approx(flops, rel=0.01)
    found = {letter: float(count) for letter, count in re.findall(r"([A-Z]+) ([\d.]+)", said["evaluations"][0].split(" a picture")[0])}
    written = tmp_path / "out" / ("results.json" if (tmp_path / "out" / "results.json").exists() else "sample.json")
    record = json.loads(written.read_text())
    taken = record["rows"][0]["evaluations"] if "rows" in record else [record["evaluations"]]
    assert list(found.values()) == taken
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.png")) < number(said["disk"][0])


def test_a_tree_of_schedules_counts_shared_steps_once(planned: Callable) -> None:
    words = ["--all_tradeoffs", "--class-labels", "1", "--save_dir", "out"]
    said = planned(sample_t_stitch.main, *words, *QUICK)
    assert said["evaluations"][0].startswith("S 5, L 15 a picture, doubled by guidance, shared by the schedules; 55 without")
    assert number(said["FLOPs"][0]) == pytest.approx(flops_of_run(sample_t_stitch.main, *words, *QUICK), rel=0.01)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (sample_ddp.main, []),
        (sample_ddp_t_stitch.main, ["--ratios", "0", "0.4"]),
        (sit_sample_ddp.main, ["SDE", "--ratios", "0", "0.4"]),
        (sample_imagenet_ddp_t_stitch.main, ["--ratio", "0.4"]),
    ],
)
def test_bytes_and_flops_of_a_generator_are_those_of_the_run(
    planned: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable, words: list[str]
) -> None:
    monkeypatch.setattr(generate, "free_cores", lambda: 0)  # torch counts in its own thread: pictures are decoded in it, too
    more = ["--num-fid-samples", "6", "--per-proc-batch-size", "4", "--sample-dir", "out"]
    said = planned(main, *words, *QUICK, *more)
    flops = flops_of_run(main, *words, *QUICK, *more)
    assert number(said["FLOPs"][0]) == pytest.approx(flops, rel=0.02)  # the last chunk has other labels
    assert number(said["disk"][0]) == pytest.approx(sum(path.stat().st_size for path in (tmp_path / "out").glob("*.npz")), rel=0.01)


def test_a_plan_is_of_the_busiest_process_and_says_how_large_its_calls_were(planned: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}

    def shared(*arguments: object, **more: object) -> None:
        plan_sampling(*arguments, **more | {"ranks": 2, "measured": 10})

    monkeypatch.setattr(generate, "plan_sampling", shared)
    monkeypatch.setattr(dry_run, "show_plan", lambda about, works, **more: shown.update(more, works=works) or show_plan(about, works, **more))
    monkeypatch.setattr(dry_run, "peak_memory", lambda device: 3e9)
    said = planned(sample_ddp.main, *QUICK, "--num-fid-samples", "30", "--per-proc-batch-size", "12", "--sample-dir", "out")
    walked, decoded = shown["works"]  # chunks of 12, 12 and 6: one process has the first and the last, and measures
    assert (walked.times, walked.busiest) == (30 * 5 + 10, 18 * 5 + 10) and (decoded.times, decoded.busiest) == (30, 18)
    seconds = (18 * 5 + 10) * walked.seconds + 18 * decoded.seconds
    assert said["time"][0].startswith(f"about {show_seconds(seconds)}, the busiest of 2 processes: ")
    assert said["memory"][0].startswith("3 GB resident at most while this was measured at 8 of up to 12 pictures a call, ")
    weights = 4e6 * float(re.search(r"([\d.]+) M parameters", said["models"][0]).group(1)) + module_bytes(
        Autoencoder(str(ROOT / "pretrained_models/emoji/vae"), "cpu").vae
    )
    assert number(said["memory"][0].split("a call, ")[1]) == pytest.approx(weights, rel=0.01)


@pytest.mark.slow
def test_processes_that_were_started_together_print_one_plan(tmp_path: Path, features: Path) -> None:
    sampling = ["--num-sampling-steps", "2", "--device", "cpu", "--dry-run"]
    training = ["--features-path", str(features), "--model", "emoji-small", "--max-steps", "3", "--global-batch-size", "8", "--dry-run"]
    for script, *words in (
        ("dit/sample_ddp.py", "--preset", "emoji", "--num-fid-samples", "6", "--per-proc-batch-size", "2", "--sample-dir", "out", *sampling),
        ("dit/sweep_emoji.py", "--ratios", "0", "0.4", "--num-images", "6", "--chunk", "2", "--no-mixes", "--out", "out.json", "--work-dir", "work", *sampling),
        ("dit/train.py", *training, "--results-dir", "run"),
    ):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / script]
        printed = subprocess.run([*launcher, *words], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300).stdout
        assert printed.count("dry run: nothing was written") == 1 and "the busiest of 2 processes" in printed
        assert not list(tmp_path.iterdir())


def test_a_generator_that_is_done_or_another_s_says_so(planned: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--ratios", "0.4", "--num-fid-samples", "3", "--sample-dir", "out", *QUICK]
    sample_ddp_t_stitch.main([word for word in words if word != "--dry-run"])
    capsys.readouterr()
    before = everything_in(tmp_path)
    sample_ddp_t_stitch.main(words)
    assert "nothing is left to do" in capsys.readouterr().out and everything_in(tmp_path) == before
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sample_ddp_t_stitch.main([*words, "--global-seed", "3"]))
    assert stopped.value.code == 2 and "holds another sweep (other seed" in capsys.readouterr().err


@pytest.mark.parametrize(("main", "words"), [(sweep_emoji.main, []), (sit_sweep.main, ["SDE"])], ids=["dit", "sit"])
def test_a_sweep_is_planned_before_it_begins(planned: Callable, tmp_path: Path, main: Callable, words: list[str]) -> None:
    few = ["--ratios", "0", "0.4", "--num-images", "6", "--chunk", "6", "--num-sampling-steps", "2", "--device", "cpu"]
    few += ["--out", "out.json", "--work-dir", "work"]
    few += ["--no-mixes"] if main is sweep_emoji.main else []
    said = planned(main, *words, *few, "--dry-run")
    assert number(said["FLOPs"][0]) == pytest.approx(flops_of_run(main, *words, *few), rel=0.01)
    assert number(said["disk"][0]) == pytest.approx((tmp_path / "work" / "sums_0.safetensors").stat().st_size, rel=0.05)


BAD = {
    "ratio": ["--ratio", "1.2"],
    "labels": ["--class-labels", "9"],
    "steps": ["--num-sampling-steps", "0"],
    "checkpoint": ["--s_ckpt", "nowhere.pt"],
    "size": ["--image-size", "128"],
    "autoencoder": ["--vae", "pretrained_models/nowhere"],
    "folder": ["--save_dir", str(ROOT / "Makefile")],
    "device": ["--device", "cuda:99"],
}


@pytest.mark.parametrize("case", BAD)
def test_a_plan_refuses_what_the_run_refuses(case: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = []
    for flag in (["--dry-run"], []):
        with pytest.raises(SystemExit) as stopped:
            run(lambda flag=flag: sample_t_stitch.main([*[word for word in QUICK if word != "--dry-run"], *flag, *BAD[case]]))
        assert stopped.value.code == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1] and said[0].startswith("error: ") and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of three classes, and captions."""
    folder = tmp_path_factory.mktemp("features")
    moments = np.random.default_rng(0).standard_normal((12, 1, 8, 16, 16))
    write_features(folder, moments, np.arange(12) % 3, num_classes=3, vae="none", scaling_factor=1.0)
    row = {"names": ["red heart"], "skin_tone": "", "style": "google", "category": "objects", "emoji": "a"}
    (folder / "captions.jsonl").write_text("".join(json.dumps(row | {"emoji": str(k)}) + "\n" for k in range(12)))
    return folder


@pytest.mark.parametrize("script", [dit_train, sit_train, train_text_to_image], ids=lambda script: script.__name__)
def test_training_costs_what_was_planned(planned: Callable, tmp_path: Path, features: Path, script: object) -> None:
    words = ["--features-path", str(features), "--model", "emoji-small", "--max-steps", "3", "--global-batch-size", "8", "--ckpt-every", "2"]
    words += ["--results-dir", "run", "--export", "out/small.safetensors", "--gradient-accumulation-steps", "2"]
    said = planned(script.main, *words, "--dry-run")
    flops = flops_of_run(script.main, *words)
    assert number(said["FLOPs"][0]) == pytest.approx(flops, rel=0.01)
    assert said["training"][0].startswith("3 steps of 8 items (2 parts of 4)")
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert number(said["disk"][0]) == pytest.approx(written, rel=0.1)
    assert number(said["disk"][1]) == pytest.approx((tmp_path / "out" / "small.safetensors").stat().st_size, rel=0.1)
    left = planned(script.main, *[word if word != "3" else "5" for word in words], "--dry-run", "--autoresume")
    assert "2 of them left" in left["training"][0]
    with pytest.raises(SystemExit):
        run(lambda: script.main([*words, "--dry-run"]))  # a folder with checkpoints, as in the real run
    with pytest.raises(SystemExit):
        run(lambda: script.main([*words, "--dry-run", "--autoresume", "--lr", "3e-4"]))


@pytest.mark.parametrize(("script", "extractor"), [(dit_train, "emoji"), (sit_train, "none")], ids=["dit", "sit"])
def test_evaluations_during_training_are_planned(planned: Callable, features: Path, script: object, extractor: str) -> None:
    words = ["--features-path", str(features), "--model", "emoji-small", "--max-steps", "3", "--global-batch-size", "4", "--results-dir", "run"]
    words += ["--vae", str(ROOT / "pretrained_models/emoji/vae"), "--eval-every", "2", "--eval-extractor", extractor, "--eval-images", "12"]
    words += ["--eval-num-sampling-steps", "4", "--eval-batch-size", "8"]
    said = planned(script.main, *words, "--dry-run")
    assert number(said["FLOPs"][0]) == pytest.approx(flops_of_run(script.main, *words), rel=0.01)
    assert "evaluation" in said["time"][0]


@pytest.mark.parametrize("layout", ["store", "files"])
def test_extraction_writes_as_many_bytes_as_were_planned(planned: Callable, tmp_path: Path, layout: str) -> None:
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)):
        (tmp_path / "pictures" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / "ab"[k % 2] / f"{k}.png")
    words = ["--data-path", "pictures", "--image-size", "64", "--vae", str(ROOT / "pretrained_models/emoji/vae"), "--layout", layout, "--device", "cpu"]
    said = planned(extract_features.main, *words, "--features-path", "out", "--dry-run")
    assert number(said["FLOPs"][0]) == pytest.approx(flops_of_run(extract_features.main, *words, "--features-path", "out"), rel=0.01)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.npy"))
    assert number(said["disk"][0]) == pytest.approx(written, rel=0.02)
    again = planned(extract_features.main, *words, "--features-path", "out", "--dry-run")
    assert "0 of them are left" in again["pictures"][0] and number(again["FLOPs"][0]) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines and a picture."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pair(folder / "sd")
    save_tiny_pair(folder / "xl", xl=True)
    tiny_controlnet(xl=True).save_pretrained(folder / "controlnet")
    tiny_unet(1, xl=True).save_pretrained(folder / "small_for_controlnet")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize("kind", ["text", "picture", "controlnet"])
def test_a_demo_is_planned_through_its_own_pipeline(planned: Callable, tmp_path: Path, models: Path, kind: str) -> None:
    family = "sd" if kind in ("text", "picture") else "xl"
    words = ["--large", str(models / family / "large"), "--small", str(models / family / "small"), "--prompt", "red heart", "dog face", "--device", "cpu"]
    words += ["--ratios", "0", "0.4", "1", "--steps", "5", "--save_dir", "out", "--guidance", "3"]
    words += {"picture": ["--image", str(models / "a.png"), "--strength", "0.7"]}.get(kind, [])
    if kind == "controlnet":
        words += ["--small", str(models / "small_for_controlnet"), "--controlnet", str(models / "controlnet"), "--image", str(models / "a.png")]
    main = {"text": sd_demo.main, "picture": sd_demo.main, "controlnet": sdxl_canny.main}[kind]
    said = planned(main, *words, "--dry-run")
    assert number(said["FLOPs"][0]) == pytest.approx(flops_of_run(main, *words), rel=0.01)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    steps = ", ".join(f"{row['ratio']:g}: {'/'.join(map(str, row['steps']))}" for row in rows)
    assert said["schedules"][0] == f"{steps} steps small/large"
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 2 * number(said["disk"][0]) + 200_000  # a grid has words too


def test_a_sweep_of_text_to_image_is_planned_and_goes_on(planned: Callable, tmp_path: Path, features: Path) -> None:
    words = ["--features-path", str(features), "--num-images", "3", "--num-sampling-steps", "4", "--max-batch", "2", "--device", "cpu", "--out", "out.json"]
    before = planned(sd_sweep.main, *words, "--ratios", "0", "--dry-run")
    assert number(before["FLOPs"][0]) == pytest.approx(flops_of_run(sd_sweep.main, *words, "--ratios", "0"), rel=0.01)
    after = planned(sd_sweep.main, *words, "--ratios", "0", "0.5", "--dry-run")
    assert "of 2 rows, of which 1 are left, at most 2 at once" in after["pictures"][0]
    assert number(after["FLOPs"][0]) == pytest.approx(flops_of_run(sd_sweep.main, *words, "--ratios", "0", "0.5"), rel=0.01)


def test_training_of_sdxl_is_planned_without_encoding(planned: Callable, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    for k in range(4):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{k}.png")
    lines = [json.dumps({"file_name": f"{k}.png", "text": f"picture {k}"}) for k in range(4)]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    words = ["--pretrained_model_name_or_path", str(models / "xl/large"), "--small_model_name_or_path", str(models / "xl/small")]
    words += ["--train_data_dir", "pictures", "--resolution", "32", "--bucket_step", "32", "--max_train_steps", "2", "--train_batch_size", "2"]
    words += ["--output_dir", "run", "--report_to", "none", "--enable_distill"]
    said = planned(train_sdxl_tstitch.main, *words, "--dry-run")
    train_sdxl_tstitch.main(words)
    folders = [tmp_path / "run" / name for name in ("checkpoints", "unet_small", "cache")]
    sizes = {folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders}
    for line, name in zip(said["disk"], sizes, strict=True):
        assert number(line) == pytest.approx(sizes[name], rel=0.3)  # tiny files are half headers
    assert "of which 4, and 5 captions, have to be encoded" in said["data"][0]

    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    package.__spec__, optim.AdamW8bit = ModuleSpec("bitsandbytes", None), torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    few = planned(train_sdxl_tstitch.main, *words, "--dry-run", "--use_8bit_adam", "--output_dir", "other", "--cache_dir", "run/cache")
    state, of_8bit = (number(lines["memory"][0].split("measured, ")[1]) for lines in (said, few))
    assert of_8bit == pytest.approx(state * 14 / 20, rel=0.01)  # 4 bytes each of weights, average, gradients; two moments of 4, or of 1
    assert number(few["disk"][0]) == pytest.approx(number(said["disk"][0]) * 10 / 16, rel=0.05)


def test_a_run_of_lightning_is_planned(planned: Callable, tmp_path: Path, features: Path) -> None:
    from ldm import main as lightning

    words = ["--base", str(ROOT / "ldm/configs/emoji-small.yaml"), "-t", "--run-dir", "run", "--accelerator", "cpu", "--max_steps", "2"]
    words += [f"data.params.train.features={features}", "data.params.validation=null", "data.params.batch_size=4", "data.params.class_balance=0"]
    words += ["model.params.monitor=null", "--enable_progress_bar", "false"]
    said = planned(lightning.main, *words, "--dry-run")
    assert number(said["FLOPs"][0]) == pytest.approx(flops_of_run(lightning.main, *words), rel=0.01)
    assert number(said["disk"][0]) == pytest.approx((tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size, rel=0.15)


@pytest.mark.parametrize(
    "flags", [["--max_steps", "2"], ["--max_epochs", "2", "--limit_train_batches", "2"], ["--max_steps", "9", "--fast_dev_run", "1"]], ids=" ".join
)
def test_checkpoints_of_lightning_are_those_that_are_left(planned: Callable, tmp_path: Path, features: Path, flags: list[str]) -> None:
    from ldm import main as lightning

    words = ["--base", str(ROOT / "ldm/configs/emoji-small.yaml"), "-t", "--run-dir", "run", "--accelerator", "cpu", *flags]
    words += [f"data.params.{part}.features={features}" for part in ("train", "validation")]
    words += ["data.params.batch_size=4", "data.params.class_balance=0", "--enable_progress_bar", "false", "lightning.modelcheckpoint.save_top_k=-1"]
    said = planned(lightning.main, *words, "--dry-run")
    lightning.main(words)
    written = list((tmp_path / "run").rglob("*.ckpt"))
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines() if (tmp_path / "run" / "log.jsonl").exists() else []
    steps = 1 if "--fast_dev_run" in flags else max(json.loads(line)["step"] for line in log)
    assert said["training"][0].startswith(f"{steps} steps are left")
    assert (said["disk"] == ["nothing"]) if not written else f" {len(written)} checkpoint" in said["disk"][0], written


def test_flops_on_a_cpu_are_those_that_a_plain_network_counts() -> None:
    q = torch.randn(2, 4, 16, 8)
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * (2 * 4 * 16 * 16 * 8)
    assert count_flops(lambda: nn.Linear(8, 3)(torch.randn(5, 8))) == 2 * 5 * 8 * 3


def test_a_step_that_is_too_long_is_derived_from_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("tstitch.dry_run._one_time", lambda take, size, device: take(size) or 0.1 + 0.05 * size)  # 0.1 s a step, 0.05 s an item
    (work,), how = plan_training(taken.append, 100, times=3, device=torch.device("cpu"))
    assert work.seconds == pytest.approx(5.1) and "derived" in how and max(taken) < 100
    monkeypatch.setattr("tstitch.dry_run._one_time", lambda take, size, device: take(size) or 0.001)
    (work,), how = plan_training(taken.append, 100, times=3, device=torch.device("cpu"))
    assert taken[-1] == 100 and how.startswith("a step was measured")


def test_what_goes_onto_one_disk_has_to_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "existing_folder", lambda folder: SimpleNamespace(stat=lambda: SimpleNamespace(st_dev=folder.parts[0])))
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2e9))
    lines = disk_lines([Files("pictures", 1.5e9, Path("a")), Files("more", 1.5e9, Path("a/b"), at_most=True), Files("results", 1.5e9, Path("c"))])
    full = "(2 GB free: NOT ENOUGH for the 3 GB that go there)"
    assert lines == [f"1.5 GB, pictures -> a {full}", f"at most 1.5 GB, more -> a/b {full}", "1.5 GB, results -> c (2 GB free)"]


def test_a_dry_run_on_a_gpu_draws_each_batch_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, features: Path) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    monkeypatch.setattr(training_cli, "create_accelerator", lambda *arguments: gpu)
    words = ["--features-path", str(features), "--results-dir", "nowhere"]
    assert training_plan(dit_train.parse_args(words)).prefetch  # the batch of the next step, which a dry run never takes
    assert not training_plan(dit_train.parse_args([*words, "--dry-run"])).prefetch


def test_numbers_are_shown_in_the_unit_that_suits_them() -> None:
    assert [show_flops(n) for n in (12.0, 1.2345e9, 2e21)] == ["12 FLOP", "1.234 GFLOP", "2000 EFLOP"]
    assert [show_bytes(n) for n in (999, 12_345, 3.2e9)] == ["999 B", "12.35 kB", "3.2 GB"]
    assert [show_seconds(n) for n in (0.5, 90, 600, 7200, 200_000)] == ["0.5 s", "90 s", "10 min", "2 h", "2.31 days"]
