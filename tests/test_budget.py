"""The tuner keeps the budget, and no schedule that keeps it is better than the chosen one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from dit import tune as dit_script
from ldm.scripts import tune as ldm_script
from sit import tune as sit_script
from tstitch.budget import Option, choose, front
from tstitch.errors import InputError
from tstitch.presets import ROOT
from tstitch.tune import peak_memory

# Largest model alone first; "worse" is beaten in both respects by "good".
OPTIONS = [
    Option("{}", name, seconds, 1.0 / seconds, largest, quality)
    for name, seconds, largest, quality in (
        ("large", 1.0, 1.0, 2.0),
        ("good", 0.7, 0.6, 1.9),
        ("worse", 0.8, 0.5, 2.1),
        ("fast", 0.4, 0.3, 2.3),
        ("small", 0.2, 0.0, 4.0),
    )  # fmt: skip
]
UNKNOWN = [replace(option, quality=None) for option in OPTIONS]
QUICK = ["--preset", "emoji", "--num-images", "1", "--num-sampling-steps", "20", "--device", "cpu"]


def test_the_front_is_what_nothing_beats_in_both_respects() -> None:
    names = {option.name for option in front(OPTIONS)}
    assert names == {"small", "fast", "good"}
    for option in OPTIONS:
        beaten = any(other.seconds <= option.seconds and other.quality <= option.quality and other != option for other in OPTIONS)
        assert (option.name in names) == (not beaten)
    assert len(front(UNKNOWN)) == len(OPTIONS)


@pytest.mark.parametrize(("latency", "speed_up", "max_loss"), [*product((None, 0.5, 0.9), (None, 1.1, 2.0), (None, 0.0, 0.2))])
def test_what_is_chosen_keeps_the_budget_and_is_the_best_that_does(latency: float | None, speed_up: float | None, max_loss: float | None) -> None:
    def fits(option: Option) -> bool:
        return (
            (latency is None or option.seconds <= latency)
            and (speed_up is None or option.speed_up >= speed_up)
            and (max_loss is None or option.quality <= (1 + max_loss) * 2.0)
        )

    budget = {"latency": latency, "speed_up": speed_up, "max_loss": max_loss}
    fitting = [option for option in OPTIONS if fits(option)]
    if not fitting:
        with pytest.raises(InputError, match="of the schedules that are fast enough the best, fast, is"):
            choose(OPTIONS, **budget)
        return
    chosen = choose(OPTIONS, **budget)
    assert fits(chosen) and chosen in front(OPTIONS)
    if max_loss is None:
        assert all(chosen.quality <= option.quality for option in fitting)
    else:
        assert all(chosen.seconds <= option.seconds for option in fitting)


def test_of_unknown_quality_the_most_of_the_largest_model_is_chosen_and_a_loss_is_refused() -> None:
    assert choose(UNKNOWN, latency=0.9).name == "good"  # and not the slower one with less of it
    with pytest.raises(InputError, match="cannot be judged"):
        choose(UNKNOWN, max_loss=0.1)
    with pytest.raises(InputError, match="small, takes 0.2 s a picture here, 5.00 times"):
        choose(UNKNOWN, latency=0.1)


@pytest.mark.parametrize(
    ("script", "words", "names"),
    [
        (dit_script, [], {"S", "B", "L"}),
        (sit_script, ["--sampling-method", "heun2", "--num-sampling-steps", "11"], {"S", "L"}),
        (ldm_script, [], {"S", "L"}),
    ],
    ids=["dit", "sit", "ldm"],
)
def test_the_scripts_choose_among_measured_schedules(script: object, words: list[str], names: set[str], tmp_path: Path) -> None:
    first = ["ODE"] if script is sit_script else []
    script.main([*first, *QUICK, *words, "--speed-up", "1.01", "--out", str(tmp_path / "tune.json")])
    found = json.loads((tmp_path / "tune.json").read_text())
    assert set(found["models"]) == names and found["quality_from"]
    options = {option["name"]: option for option in found["options"]}
    assert options["L:100"]["speed_up"] == 1.0 and found["chosen"] == options[found["chosen"]["name"]]
    assert found["chosen"]["speed_up"] >= 1.01
    assert all(option["quality"] >= found["chosen"]["quality"] for option in options.values() if option["speed_up"] >= 1.01)


@pytest.mark.parametrize("budget", [[], ["--latency", "0"], ["--speed-up", "-1"], ["--max-loss", "nan"]])
def test_a_budget_that_says_nothing_is_refused_before_anything_is_loaded(budget: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit_script, "load_denoisers", None)
    with pytest.raises(InputError, match="--latency|--speed-up|--max-loss"):
        dit_script.main([*QUICK, *budget, "--out", str(tmp_path / "tune.json")])
    assert not (tmp_path / "tune.json").exists()


@pytest.mark.parametrize("script", [dit_script, sit_script, ldm_script], ids=["dit", "sit", "ldm"])
def test_a_folder_for_a_file_is_refused_before_anything_is_measured(script: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "tune", lambda *how: pytest.fail("measured"))
    with pytest.raises(InputError, match="is a folder; name a file"):
        script.main([*(["ODE"] if script is sit_script else []), *QUICK, "--speed-up", "2", "--out", str(tmp_path)])


def test_without_the_module_resource_there_is_no_figure_and_everything_else() -> None:
    as_on_windows = "import sys; sys.modules['resource'] = None; import torch; from tstitch.tune import peak_memory; print(peak_memory(torch.device('cpu')))"
    assert subprocess.run([sys.executable, "-c", as_on_windows], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "nan\n"
    assert peak_memory(torch.device("cpu")) > 2**20


def test_a_method_that_chooses_its_own_steps_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sit_script, "load_flows", lambda *args, **how: pytest.fail("loaded"))
    with pytest.raises(InputError, match="chooses its own steps"):
        sit_script.main(["ODE", *QUICK, "--speed-up", "2", "--out", str(tmp_path / "tune.json")])
