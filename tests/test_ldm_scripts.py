"""The LDM scripts as a user runs them, on tiny random pairs: one in the published layout, one as ldm/main.py exports it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import VQModel
from ldm_tiny import KL, VQ, randomised
from PIL import Image

from ldm import cli, evaluator
from ldm.autoencoder import load_autoencoder
from ldm.checkpoints import LDMCheckpoint, LDMFacts, compvis_state_dict, load_ldm_denoisers, read_ldm
from ldm.config import FirstStageConfig
from ldm.networks import build_ldm_first_stage, build_ldm_unet
from ldm.scripts import sample_imagenet_32_t_stitch, sample_imagenet_ddp_t_stitch, sweep_emoji
from tstitch import generate, metrics, tradeoff
from tstitch.autoencoder import Autoencoder, AutoencoderFile, to_uint8
from tstitch.checkpoints import save_weights
from tstitch.cli import run
from tstitch.data import ImageLatents, draw_latents
from tstitch.errors import InputError
from tstitch.pictures import ImageFolder
from tstitch.presets import ROOT
from tstitch.schedule import StitchSchedule

UNET = {
    "image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [], "num_res_blocks": 1, "channel_mult": [1],
    "num_heads": 2, "use_spatial_transformer": True,
}  # fmt: skip
WIDTHS = (8, 16)  # of the contexts of small and large


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a pair, its first stage and its yaml in the layout of the published ones, but small: 3x8x8 latents, 10 classes, no null label."""
    folder = tmp_path_factory.mktemp("published")
    for k, name in enumerate(("ldm_s", "ldm")):
        raw, average = (compvis_state_dict(randomised(build_ldm_unet(UNET | {"context_dim": WIDTHS[k]}), seed)) for seed in (10 + k, k))
        table = torch.rand(10, WIDTHS[k], generator=torch.Generator().manual_seed(k))
        buffers = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
        torch.save({"state_dict": LDMCheckpoint([raw], [average], [{"embedding.weight": table}], {}, buffers).state_dict()}, folder / f"{name}.ckpt")
    torch.save({"state_dict": compvis_state_dict(randomised(build_ldm_first_stage(VQ, "vq"), 5))}, folder / "vq.ckpt")
    unets = [{"unet_config": {"target": "ldm.UNetModel", "params": UNET | {"context_dim": width}}} for width in WIDTHS]
    embedders = [{"cond_stage_config": {"target": "ldm.ClassEmbedder", "params": {"embed_dim": width, "n_classes": 10}}} for width in WIDTHS]
    first_stage = {"target": "ldm.VQModelInterface", "params": VQ | {"ckpt_path": "nowhere.ckpt", "lossconfig": {"target": "torch.nn.Identity"}}}
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, "channels": 3, "small_ratio": 0.8, "unet_config": unets,
        "cond_stage_config": embedders, "first_stage_config": first_stage,
    }  # fmt: skip
    (folder / "pair.yaml").write_text(yaml.safe_dump({"model": {"target": "ldm.LatentDiffusion", "params": params}}))
    return [
        "--cfg", str(folder / "pair.yaml"), "--ldm_s_path", str(folder / "ldm_s.ckpt"), "--ldm_path", str(folder / "ldm.ckpt"),
        "--ae_ckpt", str(folder / "vq.ckpt"), "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name an emoji pair as ldm/main.py exports it, of tiny networks."""
    folder = tmp_path_factory.mktemp("exported")
    for k, size in enumerate(("small", "large")):
        params = UNET | {"image_size": 16, "in_channels": 4, "out_channels": 4, "context_dim": WIDTHS[k]}
        table = torch.randn(10, WIDTHS[k], generator=torch.Generator().manual_seed(k))
        state = LDMCheckpoint([compvis_state_dict(randomised(build_ldm_unet(params), k))], [], [{"embedding.weight": table}]).state_dict()
        save_weights(folder / f"{size}.safetensors", state, {"unet": params, "num_classes": 9})
    return ["--preset", "emoji", "--ldm_s_path", str(folder / "small.safetensors"), "--ldm_path", str(folder / "large.safetensors"), "--device", "cpu"]


def pictures(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What the picture script makes: uint8 (N, schedules, 3, H, W)."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(tradeoff, "save", lambda folder, plan, comparison: seen.append(comparison.images))
        sample_imagenet_32_t_stitch.main([*arguments, "--save_dir", str(folder)])
    return seen[0]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to one grey level, which the last bit of float32 may turn, and where it turned a code of a VQ too, in few places."""
    assert a.shape == b.shape
    return ((a.int() - b.int()).abs() <= 1).float().mean() > 0.98


# First stages


@pytest.fixture(scope="module")
def vq() -> VQModel:
    return randomised(build_ldm_first_stage(VQ, "vq", scale_factor=0.5), 5)


def test_a_vq_autoencoder_is_the_library_s_model_with_scaled_unquantised_latents_without_variance(vq: VQModel) -> None:
    ours = Autoencoder(AutoencoderFile(Path("vq.ckpt"), lambda: vq))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moments = ours.encode(images, batch=2)
    with torch.no_grad():
        before_quantisation = vq.encode(images / 127.5 - 1).latents
        expected = to_uint8(vq.decode(before_quantisation).sample)
    assert ours.latent_shape(16) == (3, 8, 8) and moments.shape == (5, 6, 8, 8)  # as wide as the codes, not as the encoder
    torch.testing.assert_close(moments[:, :3], before_quantisation, rtol=1e-4, atol=1e-4)
    latents = draw_latents(moments.half().float(), None, ours.scaling_factor)
    assert torch.equal(latents, moments.half().float()[:, :3] * 0.5)  # nothing is drawn
    assert close(ours.decode(moments[:, :3] * 0.5), expected)
    unquantised = to_uint8(vq.decode(before_quantisation, force_not_quantize=True).sample)
    assert not close(ours.decode(moments[:, :3] * 0.5), unquantised)


@pytest.mark.parametrize(("kind", "params"), [("vq", VQ), ("kl", KL)])
def test_a_first_stage_of_a_configuration_is_loaded_from_the_path_given_or_its_own(kind: str, params: dict, tmp_path: Path) -> None:
    model = randomised(build_ldm_first_stage(params, kind), 3)
    torch.save({"state_dict": compvis_state_dict(model)}, tmp_path / "model.ckpt")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = 0.1 * torch.randn(2, *(3, 8, 8) if kind == "vq" else (4, 8, 8), generator=torch.Generator().manual_seed(0))
    for config, path in (
        (FirstStageConfig(kind, params, str(tmp_path / "model.ckpt")), None),
        (FirstStageConfig(kind, params, "nowhere.ckpt"), tmp_path / "model.ckpt"),
    ):
        loaded = load_autoencoder(config, path=path, scale_factor=0.1)
        direct = Autoencoder(AutoencoderFile(tmp_path / "model.ckpt", lambda: model))
        assert torch.equal(loaded.encode(images), direct.encode(images))
        assert torch.equal(loaded.decode(latents), direct.decode(latents * 10))
        assert loaded.weights == tmp_path / "model.ckpt"
    with pytest.raises(InputError, match="names no weights"):
        load_autoencoder(FirstStageConfig(kind, params))
    with pytest.raises(InputError, match=r"no checkpoint at nowhere\.ckpt"):
        load_autoencoder(FirstStageConfig(kind, params, "nowhere.ckpt"))


def test_pictures_are_encoded_by_a_first_stage_that_is_loaded_already(vq: VQModel, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for k in range(2):
        drawn = np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(tmp_path / "class" / f"{k}.png")
    autoencoder = Autoencoder(AutoencoderFile(tmp_path / "class" / "0.png", lambda: vq))  # any file: its hash names the autoencoder
    data = ImageLatents(ImageFolder(tmp_path, 16), autoencoder, flip=False)
    expected = autoencoder.encode(torch.stack([data.pictures.image(k) for k in range(2)]))[:, :3] * 0.5
    assert data.latent_shape == (3, 8, 8)
    torch.testing.assert_close(data.latents(torch.arange(2)), expected)


# Weights


def test_an_exported_model_says_what_it_is_and_a_checkpoint_has_to_be_told(exported: list[str], published: list[str]) -> None:
    path = Path(exported[3])
    (model,) = load_ldm_denoisers(path)
    assert (model.num_classes, model.has_null_label, model.latent_shape) == (9, True, (4, 16, 16))
    assert all(torch.equal(value, read_ldm(path).unets[0][name].float()) for name, value in compvis_state_dict(model.unet).items())
    with pytest.raises(InputError, match=r"ldm_s\.ckpt does not say what its U-Net looks like; pass the yaml"):
        load_ldm_denoisers(published[3])


# Pictures


def test_all_ratios_of_the_emoji_pair_write_a_grid_and_a_table(exported: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sample_imagenet_32_t_stitch.main(
        [*exported, "--all_ratios", "--sampling-steps", "5", "--class-labels", "0", "8", "--save_dir", str(tmp_path), "--solver", "plms"]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [StitchSchedule.from_json(row["schedule"]).fractions[0] for row in results["rows"]] == [k / 10 for k in range(11)]
    assert results["rows"][0]["evaluations"] == [0, 6]  # PLMS takes its first step twice
    assert results["settings"].items() >= {"preset": "emoji", "solver": "PLMS", "eta": 0.0, "uncond": "null", "cfg_scale": 2.0, "cfg_channels": "all"}.items()
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 20
    assert "| ratio 0.9 |" in capsys.readouterr().out


def test_a_pair_in_the_published_layout_is_sampled_with_noise_and_random_unconditional_contexts(published: list[str], tmp_path: Path) -> None:
    sample_imagenet_32_t_stitch.main(
        [*published, "--sampling-steps", "7", "--ratio", "0.3", "--switch-by", "t", "--class-labels", "1", "7", "--save_dir", str(tmp_path)]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["evaluations"] for row in results["rows"]] == [[3, 5]]  # 7 gives 8 steps, 3 of them above 700
    assert results["settings"].items() >= {"solver": "DDIM", "eta": 1.0, "uncond": "random", "cfg_scale": 3.0, "image_size": 16}.items()
    assert results["weights"].keys() == {"S", "L", "vae"}


def test_flags_that_the_published_script_ignores_act(published: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [*published, "--sampling-steps", "4", "--class-labels", "1", "--ratio", "0.5"]
    plain = pictures(quick, tmp_path, monkeypatch)
    assert torch.equal(pictures(quick, tmp_path, monkeypatch), plain)
    for flags in (["--cfg-scale", "1"], ["--ddim_eta", "0"], ["--use", "model"], ["--seed", "1"], ["--sampling-steps", "5"], ["--solver", "dpm++"]):
        assert not close(pictures([*quick, *flags], tmp_path, monkeypatch), plain), flags


@pytest.mark.parametrize("pair", ["exported", "published"])
def test_all_ratios_start_from_the_noise_of_a_single_one(pair: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [*request.getfixturevalue(pair), "--sampling-steps", "5", "--class-labels", "2", "3", "--seed", "4"]
    every = pictures([*quick, "--all_ratios"], tmp_path, monkeypatch)
    assert every.shape[:2] == (2, 11)
    for ratio in (0, 4, 10):
        assert close(pictures([*quick, "--ratio", str(ratio / 10)], tmp_path, monkeypatch)[:, 0], every[:, ratio])
    assert not close(every[:, 0], every[:, 10])


@pytest.mark.parametrize("pair", ["exported", "published"])
def test_a_picture_depends_on_its_seed_and_label_alone(pair: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [*request.getfixturevalue(pair), "--sampling-steps", "4", "--ratio", "0.5"]
    company = pictures([*quick, "--class-labels", "2", "5", "8", "--seed", "3"], tmp_path, monkeypatch)
    assert close(pictures([*quick, "--class-labels", "5", "--seed", "4"], tmp_path, monkeypatch)[0], company[1])


def test_latents_are_scaled_as_the_checkpoints_say(published: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(*stored: float | None) -> float:
        facts = iter([LDMFacts(False, value) for value in stored])
        monkeypatch.setattr(cli, "read_ldm_facts", lambda path, num_classes: next(facts))
        plan, _, _ = cli.ldm_plan(sample_imagenet_32_t_stitch.parse_args([*published, "--class-labels", "1"]))
        return Autoencoder(plan.vae).scaling_factor

    assert scale(None, None) == 1.0
    assert scale(0.25, 0.25) == scale(None, 0.25) == 0.25
    with pytest.raises(InputError, match="scale_factor is 0.25 in .*, 0.5 in "):
        scale(0.25, 0.5)


def test_defaults_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "read_ldm_facts", lambda path, num_classes: LDMFacts(False, None))  # there are no published weights here
    script = sample_imagenet_32_t_stitch
    plan, files, _ = cli.ldm_plan(script.parse_args(["--device", "cpu"]), each=8)
    assert (plan.num_steps, plan.guidance.scale, plan.guidance.channels, plan.image_size, plan.latent_size) == (100, 3.0, None, 256, 32)
    assert plan.labels.tolist() == [25] * 8 + [187] * 8 + [448] * 8 + [992] * 8
    assert plan.also["eta"] == 1.0 and plan.also["uncond"] == "random"
    assert [str((ROOT / path).relative_to(ROOT)) for path in (*(file.path for file in files), plan.vae.path)] == [
        "pretrained_models/ldm_s.ckpt", "pretrained_models/ldm.ckpt", "pretrained_models/vq-f8/model.ckpt",
    ]  # fmt: skip
    assert script.parse_args([]).ratio == 0.4
    args = sample_imagenet_ddp_t_stitch.parse_args(["--device", "cpu", "--num-fid-samples", "4", "--tf32", "True", "--ddim_eta", "1"])
    plan, _, _ = cli.ldm_plan(args, fid=True)
    assert (plan.num_steps, plan.guidance.scale, args.ratio, args.tf32, plan.max_batch, plan.num_classes) == (200, 3.0, [0.5], True, 32, 1000)


def truncated(tmp_path: Path) -> str:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((ROOT / "pretrained_models/emoji/dit-small.safetensors").read_bytes()[:100_000])
    return str(path)


BAD_INPUT: dict[str, tuple[str, list[str | Callable[[Path], str]], str]] = {
    "ratio": ("exported", ["--ratio", "1.2"], "ratio must lie in [0, 1]"),
    "preset": ("exported", ["--preset", "imagenet512"], "choose from emoji, imagenet256"),
    "labels": ("exported", ["--class-labels", "9"], "choose from 0..8"),
    "no steps": ("exported", ["--sampling-steps", "0"], "must lie in 1..1000"),
    "image size": ("exported", ["--image-size", "128"], "was trained for 64x64"),
    "classes": ("exported", ["--num-classes", "10"], "was trained for 9 classes"),
    "eta": ("exported", ["--ddim_eta", "1.5"], "eta must lie in [0, 1]"),
    "eta of another solver": ("exported", ["--solver", "plms", "--ddim_eta", "1"], "--ddim_eta belongs to ddim"),
    "no moving average": ("exported", ["--use", "ema"], "holds no ema weights; choose from model"),
    "first stage without a configuration": ("exported", ["--ae_ckpt", "vq.ckpt"], "pass --cfg"),
    "two autoencoders": ("published", ["--vae", "mse"], "pass --cfg and no --vae"),
    "missing weights": ("exported", ["--ldm_s_path", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
    "truncated weights": ("exported", ["--ldm_path", truncated], "truncated"),
    "a DiT": ("exported", ["--ldm_path", str(ROOT / "pretrained_models/emoji/dit-small.safetensors")], "pass a LatentDiffusion checkpoint"),
    "no configuration": ("published", ["--cfg", "nowhere.yaml"], "no configuration at nowhere.yaml"),
    "configuration of one": ("published", ["--cfg", str(ROOT / "ldm/configs/emoji-small.yaml")], "configures one U-Net"),
    "no null label": ("published", ["--class-labels", "1", "--uncond", "null"], "pass --uncond random or --cfg-scale 1"),
    "autoencoder of other latents": ("published", ["--class-labels", "1", "--ae_ckpt", str(ROOT / "Makefile")], "was not loaded"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_exit_code_2_and_no_file(case: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pair, arguments, says = BAD_INPUT[case]
    arguments = [a(tmp_path) if callable(a) else a for a in arguments]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sample_imagenet_32_t_stitch.main([*request.getfixturevalue(pair), "--save_dir", str(out), *arguments]))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert error.startswith("error: ") and "\n" not in error and says in error
    assert not out.exists()


@pytest.mark.parametrize("flags", [["--rato"], ["--all_ratio"], ["--solver", "ddpm"], ["--uncond", "zero"], ["--ratio", "0.5", "--all_ratios"]], ids=str)
def test_unknown_words_are_errors(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        sample_imagenet_32_t_stitch.main(flags)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


# Many pictures


@pytest.fixture
def torch_as_it_was():
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_three_ranks_of_the_old_launcher_and_a_run_that_was_cut_off_write_the_bytes_of_one(
    published: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_as_it_was: None
) -> None:
    arguments = [*published, "--num-sampling-steps", "3", "--ratio", "0", "0.5", "--num-fid-samples", "7", "--per-proc-batch-size", "2"]
    sample_imagenet_ddp_t_stitch.main([*arguments, "--sample-dir", str(tmp_path / "one" / "run")])
    whole = contents(tmp_path / "one" / "run")
    assert whole.keys() == {"config.json", "ratio_0.00.npz", "ratio_0.00.json", "ratio_0.50.npz", "ratio_0.50.json"}
    with np.load(tmp_path / "one" / "run" / "ratio_0.50.npz") as archive:
        assert archive["arr_0"].shape == (7, 16, 16, 3) and archive["arr_0"].std() > 10

    launch = [sys.executable, "-m", "torch.distributed.launch", "--standalone", "--nproc-per-node", "3"]  # passes --local-rank
    script = str(ROOT / "ldm/scripts/sample_imagenet_ddp_t_stitch.py")
    subprocess.run([*launch, script, *arguments, "--sample-dir", str(tmp_path / "three" / "run")], check=True, capture_output=True, timeout=300)
    assert contents(tmp_path / "three" / "run") == whole

    calls, walk = [], generate.walk

    def cut_off(*of_walk):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return walk(*of_walk)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "walk", cut_off)
        with pytest.raises(KeyboardInterrupt):
            sample_imagenet_ddp_t_stitch.main([*arguments, "--sample-dir", str(tmp_path / "cut" / "run")])
    sample_imagenet_ddp_t_stitch.main([*arguments, "--sample-dir", str(tmp_path / "cut" / "run")])
    assert contents(tmp_path / "cut" / "run") == whole


def test_many_pictures_are_those_of_the_picture_script(exported: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_as_it_was: None) -> None:
    quick = [*exported, "--num-sampling-steps", "3", "--ratio", "0.5", "--class-labels", "1", "6"]
    sample_imagenet_ddp_t_stitch.main([*quick, "--num-fid-samples", "2", "--per-proc-batch-size", "1", "--sample-dir", str(tmp_path / "many")])
    with np.load(tmp_path / "many" / "ratio_0.50.npz") as archive:
        many = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2)
    assert close(pictures(quick, tmp_path, monkeypatch)[:, 0], many)


def test_a_sweep_measures_eleven_ratios(exported: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sweep_emoji.main(
        [*exported, "--num-images", "4", "--chunk", "2", "--num-sampling-steps", "2", "--ddim_eta", "0", "--out", str(out), "--work-dir", str(tmp_path / "w")]
    )
    table = json.loads(out.read_text())
    assert [row["evaluations"] for row in table["rows"]] == [[int(k / 5), 2 - int(k / 5)] for k in range(11)]
    assert table["settings"]["eta"] == 0.0 and all(row["fd_emoji"] > 0 for row in table["rows"])
    assert Image.open(out.with_suffix(".png")).size[0] > 300


def test_the_evaluator_is_the_shared_one() -> None:
    assert evaluator.main is metrics.__main__.main


def test_scripts_run_from_the_root_and_from_their_folder() -> None:
    for folder in (ROOT, ROOT / "ldm"):
        script = (ROOT / "ldm/scripts/sample_imagenet_ddp_t_stitch.py").relative_to(folder)
        done = subprocess.run([sys.executable, str(script), "--help"], cwd=folder, capture_output=True, text=True, check=True)
        assert "--ldm_s_path" in done.stdout
