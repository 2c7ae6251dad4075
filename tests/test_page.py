"""The web page without a browser: what it draws, refuses and samples. test_web.py drives it."""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ET
from dataclasses import replace

import gradio as gr
import numpy as np
import pytest
from sd_tiny import tiny_sd, tiny_unet

from dit import sample_t_stitch as dit_script
from ldm.scripts import sample_imagenet_32_t_stitch as ldm_script
from sd import gradio_demo
from sd.page.classes import class_backbones
from sd.page.drawings import Point, front, steps_strip, tradeoff, triangle
from sd.page.jobs import Jobs, Stopped, messages
from sd.page.prompts import PromptBackbone, prompt_backbones
from sd.page.request import Request
from sd.tstitch_sd_utils import stitch
from sit import sample_t_stitch as sit_script
from tstitch.cli import run
from tstitch.errors import InputError
from tstitch.schedule import StitchSchedule, two_way_ratios


def tiny_prompts() -> PromptBackbone:
    """A backbone of prompts whose models are tiny and random, but stitched and called as the real ones."""
    emoji = prompt_backbones("cpu", None)[0]
    return replace(
        emoji,
        title="Tiny SD",
        build=lambda large, small: stitch(tiny_sd(), tiny_unet(1, width=8)),
        bundled=False,
        large=["."],
        small=["."],
        num_steps=4,
        count=2,
    )


def ask(**values: object) -> Request:
    return replace(class_backbones("cpu", "fp32")[0].default, **values)


def ignore(share: float, words: str) -> None:
    pass


def test_the_strip_has_every_step_once_in_order() -> None:
    for ratio in (0.0, 0.37, 1.0):
        legs = re.findall(r">(\d+) (small|large)<", steps_strip(StitchSchedule.from_ratio(ratio), ["S", "L"], 20))
        counts = {word: int(count) for count, word in legs}
        assert counts.get("small", 0) == int(20 * ratio + 1e-6) and sum(counts.values()) == 20
        assert [word for _, word in legs] == sorted(counts, reverse=True)


def test_the_curve_goes_through_the_points_that_no_other_beats() -> None:
    points = [Point("a", 1.0, 3.0), Point("b", 1.2, 2.5), Point("c", 1.4, 3.0), Point("d", 1.3, 3.5)]
    assert [p.name for p in front(points)] == ["b", "c"]
    drawn = ET.fromstring(tradeoff(points, "c", "<loss>", "here & now"))
    circles = list(drawn.iter("circle"))
    assert len(circles) == 4 and circles[-1].get("class") == "dot chosen" and circles[-1].find("title").text.startswith("c: 1.40")
    ET.fromstring(tradeoff(points[:1], "x", "loss", ""))  # one point has no extent
    ET.fromstring(triangle((0.2, 0.2, 0.6)))


def test_errors_are_sentences_and_defects_go_to_the_log(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(gr.Error) as bad, messages():
        raise InputError("write <b>")
    assert bad.value.message == "write &lt;b&gt;" and not bad.value.print_exception and not capsys.readouterr().err
    with pytest.raises(gr.Error) as defect, messages():
        raise RuntimeError("secret place")
    assert "secret" not in defect.value.message and "Traceback" in capsys.readouterr().err
    with messages():
        raise Stopped


def test_a_run_stops_alone_and_an_older_one_of_its_owner_stops_too() -> None:
    jobs = Jobs()
    with jobs.run(("ann", "DiT")) as ann, jobs.run(("bob", "DiT")) as bob:
        assert jobs.stop(("ann", "DiT")) and ann.is_set() and not bob.is_set()
        with jobs.run(("bob", "DiT")) as newer:
            assert bob.is_set() and not newer.is_set()
            jobs.stop_all("bob")
            assert newer.is_set()
    assert not jobs.stop(("ann", "DiT"))


BAD_REQUESTS = {
    "no seed": ({"seed": None}, "seed must lie in 0..4294967295; type a number"),
    "negative seed": ({"seed": -1}, "seed must lie in"),
    "no steps": ({"num_steps": 1}, "steps must lie in 2..100, got 1"),
    "too many steps": ({"num_steps": 101}, "steps must lie in 2..100"),
    "no pictures": ({"count": 0}, "pictures must lie in 1..16"),
    "guidance": ({"guidance": float("nan")}, "guidance must lie in 1..10, got nan"),
    "empty prompt": ({"subject": "  "}, "the prompt is empty"),
    "no prompt": ({"subject": None}, "the prompt is empty"),
    "negative prompt that decides nothing": ({"negative_prompt": "blue", "guidance": 1.0}, "counts only with guidance above 1"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_get_one_sentence(case: str) -> None:
    values, says = BAD_REQUESTS[case]
    with pytest.raises(InputError, match=re.escape(says)):
        ask(**values).check(class_backbones("cpu", "fp32")[0])


def test_the_command_of_every_tab_is_one_that_its_script_takes() -> None:
    scripts = {"dit/sample_t_stitch.py": dit_script, "sit/sample_t_stitch.py": sit_script, "ldm/scripts/sample_imagenet_32_t_stitch.py": ldm_script}
    checked = 0
    for backbone in class_backbones("cpu", "fp32"):
        for method in backbone.methods:
            three = [[StitchSchedule((0.2, 0.2, 0.6))]] if len(backbone.letters) == 3 else []
            for schedules in ([StitchSchedule.from_ratio(0.4)], two_way_ratios(), *three):
                _, script, *arguments = shlex.split(backbone.command(replace(backbone.default, method=method), schedules))
                scripts[script].parse_args(arguments)
                checked += 1
    assert checked >= 15


def test_a_prompt_is_sampled_ratio_by_ratio_from_the_same_noise_and_can_be_stopped() -> None:
    backbone = tiny_prompts()
    request = replace(backbone.default, subject="red heart")
    seen = []
    stages = list(backbone.sample(request, two_way_ratios(4), lambda share, words: seen.append(share)))
    assert [len(samples) for samples in stages] == [1, 2, 3, 4, 5] and seen[-1] == 1 and seen == sorted(seen)
    assert [sample.name for sample in stages[-1]] == ["L:100", "S:25 L:75", "S:50 L:50", "S:75 L:25", "S:100"]
    assert stages[-1][0].difference == 0 < stages[-1][4].difference
    ((again, *_),) = [list(backbone.sample(request, [StitchSchedule.from_ratio(0.0)], ignore))[-1:][0]]
    assert np.array_equal(np.asarray(again.sheet), np.asarray(stages[-1][0].sheet))

    def stop(share: float, words: str) -> None:
        if share > 0.3:
            raise Stopped

    with pytest.raises(Stopped):
        list(backbone.sample(request, two_way_ratios(4), stop))
    assert len(list(backbone.sample(request, [StitchSchedule.from_ratio(1.0)], ignore))[-1]) == 2  # the pipeline serves the next


def test_models_that_are_not_here_are_named_with_what_to_do() -> None:
    for backbone in prompt_backbones("cpu", None)[1:]:
        note = backbone.note(replace(backbone.default, large="nobody/nothing"))
        assert "nobody/nothing" in note and "`pretrained_models/nobody/nothing`" in note and "Generate fetches" in note
        assert backbone.available()

    def no_network(large: str, small: str) -> None:
        raise InputError("no such host")

    backbone = replace(prompt_backbones("cpu", None)[1], large=["nobody/nothing"], build=no_network)
    with pytest.raises(InputError, match="could not fetch nobody/nothing, .*; connect to the network, or copy"):
        list(backbone.sample(backbone.default, two_way_ratios(2), lambda share, words: None))


def test_the_flags_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **words: launched.update(words, queue=self._queue))
    gradio_demo.main(["--port", "7999", "--host", "0.0.0.0", "--share", "--auth", "ann:a:b", "--auth", "bob:c", "--concurrency", "3", "--device", "cpu"])
    assert (launched["server_port"], launched["server_name"], launched["share"]) == (7999, "0.0.0.0", True)
    assert launched["auth"] == [("ann", "a:b"), ("bob", "c")]
    assert launched["queue"].max_size == 64


@pytest.mark.parametrize("arguments", [["--auth", "ann"], ["--auth", ":secret"], ["--device", "cuda:99"], ["--port", "0"], ["--prot", "1"]])
def test_bad_flags_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(lambda: gradio_demo.main(arguments))
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err
