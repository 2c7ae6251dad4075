"""The demos of sd/ as a user runs them, on tiny pipelines: what they write, that ratios share their noise, what they answer to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from sd_tiny import save_tiny_pair, tiny_controlnet, tiny_sd, tiny_unet
from torch import Tensor

from sd import sd_demo, sdxl_canny, sdxl_demo, sdxl_depth, sdxl_lcm_lora, sdxl_pose, tstitch_sd_utils
from sd.demo import demo_plan, read_picture
from sd.tstitch_sd_utils import stitch
from tstitch.cli import run
from tstitch.presets import ROOT

QUICK = ["--device", "cpu", "--ratios", "0", "0.4", "1", "--steps", "5"]
TWO = ["--prompt", "red heart", "dog face"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a user would have on disk: pairs of SD and SDXL, a ControlNet and its small U-Net, two pictures."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pair(folder / "sd")
    save_tiny_pair(folder / "xl", xl=True)
    tiny_controlnet(xl=True).save_pretrained(folder / "controlnet")
    tiny_unet(1, xl=True).save_pretrained(folder / "small_for_controlnet")  # what a ControlNet adds has the large U-Net's widths
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    for name, picture in zip("ab", pixels, strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


def pair(models: Path, family: str = "sd") -> list[str]:
    return ["--large", str(models / family / "large"), "--small", str(models / family / "small")]


def controlled(models: Path) -> list[str]:
    return [
        *["--large", str(models / "xl/large"), "--small", str(models / "small_for_controlnet"), "--controlnet", str(models / "controlnet")],
        *["--image", str(models / "a.png"), "--prompt", "red heart", "--negative_prompt", "", "--device", "cpu", "--steps", "2"],
    ]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def picture(folder: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder / name)).astype(int)


@pytest.fixture
def first_latents(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What each call of a pipeline starts from: a U-Net's first input, whenever the timestep rises."""
    starts, last, forward = [], [0.0], UNet2DConditionModel.forward

    def watched(self: UNet2DConditionModel, sample: Tensor, timestep: Tensor, *args: object, **kwargs: object) -> object:
        if float(timestep) >= last[0]:
            starts.append(sample.clone())
        last[0] = float(timestep)
        return forward(self, sample, timestep, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    return starts


def test_a_demo_writes_a_grid_every_picture_and_a_record(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sd_demo.main([*pair(models), *TWO, *QUICK, "--num-images", "3", "--seed", "7", "--guidance", "3", "--save_dir", str(tmp_path)])
    record = results(tmp_path)
    assert record["prompts"] == ["red heart", "dog face", "red heart"] and record["seeds"] == [7, 8, 9]
    assert [row["ratio"] for row in record["rows"]] == [0, 0.4, 1] and [row["name"] for row in record["rows"]] == ["L:100", "S:40 L:60", "S:100"]
    assert [row["steps"] for row in record["rows"]] == [[0, 5], [2, 3], [5, 0]]
    assert all(row["seconds_per_image"] > 0 for row in record["rows"])
    first, *others = record["rows"]
    assert first["speed_up"] == 1 and all(row["speed_up"] == first["seconds_per_image"] / row["seconds_per_image"] for row in others)
    assert record["settings"]["scheduler"] == "DDIMScheduler" and record["settings"]["num_steps"] == 5 and record["settings"]["guidance_scale"] == 3
    assert record["weights"]["S"] != record["weights"]["L"] and record["arguments"]["large"] == str(models / "sd/large")
    files = {name for row in record["rows"] for name in row["files"]}
    assert len(files) == 9 and {path.name for path in tmp_path.iterdir()} == files | {"grid.png", "results.json"}
    assert Image.open(tmp_path / "grid.png").size[1] > 3 * 128
    assert "|   0.4 |               2/3 |" in capsys.readouterr().out


def test_ratio_0_is_the_large_pipeline_and_ratio_1_the_one_with_the_small_unet(models: Path, tmp_path: Path) -> None:
    sd_demo.main([*pair(models), *TWO, *QUICK, "--negative_prompt", "blue", "--guidance", "4", "--seed", "3", "--save_dir", str(tmp_path)])
    for ratio, parts in (("0", {}), ("1", {"unet": UNet2DConditionModel.from_pretrained(models / "sd/small/unet")})):
        pipe = StableDiffusionPipeline.from_pretrained(models / "sd/large", **parts)
        for i, prompt in enumerate(["red heart", "dog face"]):
            alone = pipe(prompt, negative_prompt="blue", num_inference_steps=5, guidance_scale=4, generator=torch.Generator().manual_seed(3 + i)).images[0]
            assert np.abs(picture(tmp_path, f"{i:02d}_ratio_{ratio}.png") - np.asarray(alone)).max() <= 1


@pytest.mark.parametrize("script", [sd_demo, sdxl_demo, sdxl_canny], ids=lambda script: script.__name__)
def test_all_ratios_start_from_the_same_latents(models: Path, tmp_path: Path, first_latents: list[Tensor], script: object) -> None:
    words = {sd_demo: pair(models), sdxl_demo: pair(models, "xl"), sdxl_canny: controlled(models)}[script]
    script.main([*words, *TWO, *QUICK, "--max-batch", "2", "--save_dir", str(tmp_path)])
    starts = first_latents[-3:]
    assert all(start.shape == (4, 4, 8, 8) for start in starts)  # two prompts, each with and without guidance
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0][0], starts[0][1])


def test_picture_i_depends_on_its_seed_and_not_on_its_batch(models: Path, tmp_path: Path) -> None:
    words = [*pair(models), *QUICK, "--ratios", "0.4"]
    sd_demo.main([*words, *TWO, "--max-batch", "2", "--save_dir", str(tmp_path / "together")])
    sd_demo.main([*words, *TWO, "--max-batch", "1", "--save_dir", str(tmp_path / "one_by_one")])
    sd_demo.main([*words, "--prompt", "dog face", "--seed", "1", "--save_dir", str(tmp_path / "alone")])
    second = picture(tmp_path / "together", "01_ratio_0.4.png")
    assert np.abs(second - picture(tmp_path / "one_by_one", "01_ratio_0.4.png")).max() <= 1
    assert np.abs(second - picture(tmp_path / "alone", "00_ratio_0.4.png")).max() <= 1
    assert np.abs(second - picture(tmp_path / "together", "00_ratio_0.4.png")).max() > 20


def test_negative_prompts_act(models: Path, tmp_path: Path) -> None:
    words = [*pair(models), *QUICK, "--prompt", "red heart"]
    sd_demo.main([*words, "--save_dir", str(tmp_path / "without")])
    sd_demo.main([*words, "--negative_prompt", "blue", "--save_dir", str(tmp_path / "with")])
    for name in ("00_ratio_0.png", "00_ratio_1.png"):
        assert np.abs(picture(tmp_path / "without", name) - picture(tmp_path / "with", name)).max() > 5


def test_without_models_the_bundled_pair_is_taken_with_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stitch(tiny_sd(), tiny_unet(1, width=8)).save_pretrained(tmp_path / "emoji/sd")
    (tmp_path / "emoji/sd/vae").rename(tmp_path / "emoji/vae")
    monkeypatch.setattr(tstitch_sd_utils, "EMOJI", tmp_path / "emoji")
    sd_demo.main(["--ratios", "0.5", "--device", "cpu", "--save_dir", str(tmp_path / "out")])
    record = results(tmp_path / "out")
    assert record["prompts"] == ["red heart", "dog face, twitter style"] and record["models"]["L"] == "emoji"
    assert (record["settings"]["num_steps"], record["settings"]["guidance_scale"]) == (20, 3.0)
    assert record["rows"][0]["steps"] == [10, 10] and record["rows"][0]["speed_up"] is None


def test_other_models_have_other_defaults_than_the_bundled_pair(models: Path) -> None:
    args = sd_demo.parse_args([*pair(models), "--steps", "7"])
    assert (args.steps, args.guidance, args.max_batch) == (7, 7.5, 1) and len(args.prompt) == 1


def test_image_to_image_counts_its_own_steps_and_starts_from_the_picture(models: Path, tmp_path: Path) -> None:
    words = [*pair(models), *QUICK, "--prompt", "red heart", "--strength", "0.7"]
    for name in "ab":
        sd_demo.main([*words, "--image", str(models / f"{name}.png"), "--save_dir", str(tmp_path / name)])
    record = results(tmp_path / "a")
    assert record["settings"]["pipeline"] == "StableDiffusionImg2ImgPipeline" and record["settings"]["strength"] == 0.7
    assert [row["steps"] for row in record["rows"]] == [[0, 3], [1, 2], [3, 0]]  # int(0.7 * 5) of which 40 % are one
    assert np.abs(picture(tmp_path / "a", "00_ratio_1.png") - picture(tmp_path / "b", "00_ratio_1.png")).max() > 5


def test_inpainting_sees_the_mask(models: Path, tmp_path: Path) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = [*pair(models), *QUICK, *TWO, "--image", str(models / "a.png"), "--mask", str(tmp_path / "mask.png"), "--max-batch", "2"]
    sd_demo.main([*words, "--save_dir", str(tmp_path / "out")])
    assert results(tmp_path / "out")["settings"]["pipeline"] == "StableDiffusionInpaintPipeline"
    small, large = (picture(tmp_path / "out", f"00_ratio_{ratio}.png") for ratio in (1, 0))
    difference = np.abs(small - large).mean(axis=(1, 2))
    assert difference[:12].mean() > 3 * difference[24:].mean()  # what is black in the mask comes from the picture, whoever samples


def test_inpainting_makes_pictures_of_the_size_that_is_asked_for(models: Path, tmp_path: Path) -> None:
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    words = [*pair(models), "--prompt", "red heart", "--image", str(models / "a.png"), "--mask", str(tmp_path / "mask.png"), "--height", "48", "--width", "64"]
    sd_demo.main([*words, "--ratios", "0.5", "--steps", "2", "--device", "cpu", "--save_dir", str(tmp_path / "out")])
    assert results(tmp_path / "out")["settings"]["size"] == [64, 48] and picture(tmp_path / "out", "00_ratio_0.5.png").shape == (48, 64, 3)


def test_pictures_are_fitted_to_a_u_net_that_is_not_square(models: Path) -> None:
    pipe = tiny_sd()
    pipe.unet.register_to_config(sample_size=[8, 12])
    plan = demo_plan(sd_demo.parse_args([*pair(models), "--image", str(models / "a.png"), "--device", "cpu"]))
    assert [fitted.size for fitted in plan.fitted(pipe)] == [(48, 32)]


def test_a_second_run_leaves_no_pictures_of_the_first(models: Path, tmp_path: Path) -> None:
    words = [*pair(models), "--steps", "1", "--device", "cpu", "--save_dir", str(tmp_path)]
    sd_demo.main([*words, *TWO, "--ratios", "0", "1"])
    (tmp_path / "mine.png").write_bytes(b"")
    sd_demo.main([*words, "--prompt", "red heart", "--ratios", "0"])
    assert {path.name for path in tmp_path.iterdir()} == {"00_ratio_0.png", "grid.png", "results.json", "mine.png"}


def test_steps_that_a_scheduler_cannot_take_are_refused_before_any_picture(models: Path, tmp_path: Path) -> None:
    for folder, unet in (("large_lora", tiny_unet(xl=True)), ("small_lora", tiny_unet(1, width=8, xl=True))):
        save_lora(tmp_path / folder, unet)
    loras = ["--large_lcm_lora", str(tmp_path / "large_lora"), "--small_lcm_lora", str(tmp_path / "small_lora")]
    words = ["--device", "cpu", "--save_dir", str(tmp_path / "out")]
    assert "--steps 60 is not for LCMScheduler" in refusal(lambda: sdxl_lcm_lora.main([*pair(models, "xl"), *loras, *words, "--steps", "2", "60"]))
    assert "--steps 1000 is too many for DDIMScheduler" in refusal(lambda: sd_demo.main([*pair(models), *words, "--steps", "1000"]))
    assert not (tmp_path / "out").exists()


def test_a_lora_goes_to_the_large_model_alone(models: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "lora", tiny_unet(xl=True))
    words = [*pair(models, "xl"), *QUICK, "--prompt", "red heart", "--negative_prompt", ""]
    sdxl_demo.main([*words, "--save_dir", str(tmp_path / "without")])
    sdxl_demo.main([*words, "--lora", str(tmp_path / "lora"), "--save_dir", str(tmp_path / "with")])
    difference = [np.abs(picture(tmp_path / "without", f"00_ratio_{r}.png") - picture(tmp_path / "with", f"00_ratio_{r}.png")).max() for r in (0, 1)]
    assert difference[0] > 5 and difference[1] == 0


def save_lora(folder: Path, unet: UNet2DConditionModel) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def test_latent_consistency_takes_few_steps_and_every_share_of_them(models: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "large_lora", tiny_unet(xl=True))
    save_lora(tmp_path / "small_lora", tiny_unet(1, width=8, xl=True))
    words = [*pair(models, "xl"), "--large_lcm_lora", str(tmp_path / "large_lora"), "--small_lcm_lora", str(tmp_path / "small_lora"), "--device", "cpu"]
    sdxl_lcm_lora.main([*words, "--steps", "2", "4", "--save_dir", str(tmp_path / "out")])
    for steps in (2, 4):
        record = results(tmp_path / "out" / f"steps_{steps}")
        assert record["settings"]["scheduler"] == "LCMScheduler" and record["settings"]["guidance_scale"] == 1
        assert [row["steps"] for row in record["rows"]] == [[k, steps - k] for k in range(steps + 1)]
    assert sdxl_lcm_lora.parse_args([]).steps == [2, 4, 8]


def test_edges_are_where_the_brightness_jumps() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 8:24] = 255
    found = np.asarray(sdxl_canny.edges(Image.fromarray(pixels)))
    assert found.shape == (32, 32) and set(np.unique(found)) == {0, 255}
    ys, xs = found.nonzero()
    assert {int(min(abs(y - 7.5), abs(y - 23.5), abs(x - 7.5), abs(x - 23.5))) for y, x in zip(ys, xs, strict=True)} == {0}
    assert not np.asarray(sdxl_canny.edges(Image.fromarray(pixels // 20))).any()  # too weak for the thresholds


def test_a_map_acts_and_at_scale_0_says_nothing(models: Path, tmp_path: Path) -> None:
    words = [*controlled(models), "--ratios", "0.5"]
    for scale in ("0", "1"):
        sdxl_canny.main([*words, "--scale", scale, "--save_dir", str(tmp_path / scale)])
    plain = [*pair(models, "xl")[:2], "--small", str(models / "small_for_controlnet"), *controlled(models)[8:], "--ratios", "0.5"]
    sdxl_demo.main([*plain, "--save_dir", str(tmp_path / "plain")])
    free, strict, alone = (picture(tmp_path / name, "00_ratio_0.5.png") for name in ("0", "1", "plain"))
    assert np.abs(free - alone).max() <= 1 and np.abs(strict - alone).max() > 5
    record = results(tmp_path / "1")
    assert record["settings"]["controlnet_conditioning_scale"] == 1 and record["arguments"]["image"] == [str(models / "a.png")]


@pytest.fixture
def estimator(tmp_path: Path) -> Path:
    """A depth model of 0.2 MB with random weights, on disk as transformers keeps it."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    torch.manual_seed(0)
    DPTForDepthEstimation(config).save_pretrained(tmp_path / "dpt")
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dpt")
    return tmp_path / "dpt"


def test_depth_is_drawn_in_the_pictures_size_and_followed(models: Path, tmp_path: Path, estimator: Path) -> None:
    draw = sdxl_depth.depth_estimator(str(estimator), torch.device("cpu"))
    depth = draw(read_picture(models / "a.png"))
    assert depth.size == (60, 40) and depth.getextrema() == (0, 255)
    sdxl_depth.main([*controlled(models), "--ratios", "0.5", "--estimator", str(estimator), "--height", "48", "--width", "64", "--save_dir", str(tmp_path)])
    assert results(tmp_path)["settings"]["size"] == [64, 48] and picture(tmp_path, "00_ratio_0.5.png").shape == (48, 64, 3)


OPENPOSE = """
from PIL import Image

class OpenposeDetector:
    @classmethod
    def from_pretrained(cls, source):
        if source == "nowhere":
            raise OSError("no such weights")
        return cls()

    def to(self, device):
        return self

    def __call__(self, picture, detect_resolution, image_resolution):
        return Image.new("RGB", (image_resolution, image_resolution), "red")
"""


def test_poses_are_followed_where_controlnet_aux_is_installed(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "controlnet_aux").mkdir()
    (tmp_path / "controlnet_aux/__init__.py").write_text(OPENPOSE)  # in place of its weights, 400 MB
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "controlnet_aux", raising=False)
    sdxl_pose.main([*controlled(models), "--ratios", "0.5", "--save_dir", str(tmp_path / "out")])
    grid = picture(tmp_path / "out", "grid.png")
    assert (grid == [255, 0, 0]).all(axis=-1).sum() == 128 * 128  # the map is a column of the grid
    assert refusal(lambda: sdxl_pose.main([*controlled(models), "--detector", "nowhere"])) == "could not load the pose detector nowhere (no such weights); " \
        "pass its folder, or another model of the hub"  # fmt: skip
    monkeypatch.delitem(sys.modules, "controlnet_aux")


def test_a_missing_extra_says_how_to_install_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl_pose.importlib.util, "find_spec", lambda name: None)
    message = refusal(lambda: sdxl_pose.main([*controlled(models), "--save_dir", str(tmp_path / "out")]))
    assert "pip install controlnet-aux" in message and not (tmp_path / "out").exists()


def refusal(main: Callable[[], None]) -> str:
    """What a script says when it stops with exit code 2."""
    from contextlib import redirect_stderr
    from io import StringIO

    said = StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    line = said.getvalue().strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


BAD_INPUT = {
    "ratio": (["--ratios", "0", "1.2"], "ratio must lie in [0, 1], got 1.2"),
    "no number": (["--ratios", "nan"], "ratio must lie in [0, 1]"),
    "no prompt": (["--prompt"], "no prompt given"),
    "empty prompt": (["--prompt", "red heart", " "], "or an empty one"),
    "no steps": (["--steps", "0"], "must lie in 1..1000"),
    "guidance": (["--guidance", "nan"], "finite"),
    "seed": (["--seed", "-1"], "--seed must lie in 0.."),
    "size": (["--height", "60"], "multiples of 8, got 60"),
    "device": (["--device", "cuda:99"], "not available"),
    "missing picture": (["--image", "nowhere.png"], "no picture at nowhere.png"),
    "unreadable picture": (["--image", str(ROOT / "Makefile")], "cannot be read as a picture"),
    "mask alone": (["--mask", "mask.png"], "pass it with --image"),
    "strength": (["--image", "{models}/a.png", "--strength", "0.1"], "is no step"),
    "strength alone": (["--strength", "0.5"], "pass it with --image"),
    "a negative prompt without guidance": (["--negative_prompt", "blue", "--guidance", "1"], "decides nothing at --guidance 1"),
    "another family of models": (["--large", "{models}/xl/large"], "is a StableDiffusionXLPipeline, not a StableDiffusionPipeline; use sd/sdxl_demo.py"),
    "missing folder": (["--large", "./nowhere"], "no folder ./nowhere"),
    "folder without a model": (["--large", "{models}"], "could not load"),
    "small folder without a model": (["--small", "{models}"], "could not load"),
    "another kind of model": (["--small", "{models}/xl/small"], "does not fit the large one"),
    "missing LoRA": (["--lora", "./nowhere"], "could not load the LoRA ./nowhere"),
    "a folder in the way": (["--save_dir", str(ROOT / "Makefile")], "is a file; choose another folder"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_exit_code_2_and_no_file(models: Path, tmp_path: Path, case: str) -> None:
    words, says = BAD_INPUT[case]
    words = [word.format(models=models) for word in words]
    message = refusal(lambda: sd_demo.main([*pair(models), *TWO, *QUICK, "--save_dir", str(tmp_path / "out"), *words]))
    assert says in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_script_ends_with_code_2_and_no_traceback(models: Path) -> None:
    cases = {
        "unrecognized arguments: --ratio 0.5": ["sd_demo.py", *pair(models), "--ratio", "0.5"],
        "could not load nota-ai/bk-sdm-tiny": ["sd_demo.py", "--large", str(models / "sd/large"), "--small", "nota-ai/bk-sdm-tiny", "--device", "cpu"],
    }
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = {
        says: subprocess.Popen([sys.executable, str(ROOT / "sd" / words[0]), *words[1:]], env=offline, stderr=subprocess.PIPE, text=True)
        for says, words in cases.items()
    }
    for says, process in started.items():
        _, error = process.communicate(timeout=300)
        assert process.returncode == 2 and says in error and "Traceback" not in error, (says, error)
