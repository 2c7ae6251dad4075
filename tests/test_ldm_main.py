"""ldm/main.py: published configurations have the published sizes, its command line means what LDM's did, and what does not fit is refused by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_runs import build, first_stage_run, saved, unet_run, write_run_features, write_run_pictures

from ldm import main as script
from ldm.config import read_autoencoder, read_model, read_yaml
from ldm.experiment import modern
from ldm.networks import build_ldm_first_stage, build_ldm_unet
from ldm.training import LatentDiffusion
from tstitch.data import write_features
from tstitch.errors import InputError
from tstitch.presets import ROOT


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("cin-ldm-vq-f8", [394_984_196]), ("cin-ldm-vq-f8-lite", [25_386_692]), ("cin-ldm-vq-f8-t-stitch", [25_386_692, 394_984_196])],
)
def test_the_published_configurations_have_the_published_sizes(name: str, sizes: list[int]) -> None:
    config = read_model(read_yaml([ROOT / "ldm" / "configs" / f"{name}.yaml"]))
    with torch.device("meta"):
        unets = [build_ldm_unet(params) for params in config.unets]
        first_stage = build_ldm_first_stage(config.first_stage.params, config.first_stage.kind)
    assert [sum(p.numel() for p in unet.parameters()) for unet in unets] == sizes
    assert [unet.config.cross_attention_dim for unet in unets] == [table["embed_dim"] for table in config.embedders]
    assert round(sum(p.numel() for p in first_stage.parameters()) / 1e6, 1) == 67.7
    assert (config.num_classes, config.latent_shape, config.base_learning_rate) == (1000, (4, 32, 32), 1e-6)
    assert config.betas == {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000}


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_the_emoji_first_stages_halve_twice(kind: str) -> None:
    config = read_autoencoder(read_yaml([ROOT / "ldm" / "configs" / f"emoji-{kind}.yaml"]))
    model = build_ldm_first_stage(config.params, config.kind).eval()
    encoded = model.encode(torch.zeros(1, 3, 64, 64))
    assert (encoded.latents if kind == "vq" else encoded.latent_dist.mean).shape[2:] == (16, 16)


@pytest.mark.parametrize(
    ("kind", "override", "named"),
    [
        ("unet", "model.params.no_such=1", "no_such"), ("unet", "model.no_such=1", "no_such"), ("unet", "no_such.x=1", "no_such"),
        ("unet", "data.params.no_such=1", "no_such"), ("unet", "data.params.train.no_such=1", "no_such"), ("unet", "lightning.no_such=1", "no_such"),
        ("unet", "lightning.callbacks.no_such.x=1", "no_such"), ("unet", "lightning.callbacks.image_logger.no_such=1", "no_such"),
        ("unet", "lightning.modelcheckpoint.params.no_such=1", "no_such"), ("unet", "lightning.trainer.no_such=1", "no_such"),
        ("unet", "model.params.scheduler_config.params.no_such=1", "no_such"), ("unet", "model.params.scheduler_config.target=no_such", "no_such"),
        ("unet", "model.params.cond_stage_config.params.no_such=1", "no_such"), ("unet", "model.params.monitor=no_such", "no_such"),
        ("unet", "model.params.ignore_keys=[no_such]", "ignore_keys"), ("unet", "data.params.batch_size=0", "batch_size"),
        ("unet", "data.params.train.features=no_such", "no_such"), ("unet", "model.params.image_size=16", "image_size"),
        ("unet", "lightning.trainer.strategy=fsdp", "fsdp"), ("unet", "lightning.trainer.precision=no_such", "no_such"), ("unet", "no_such", "no_such"),
        ("unet", "model.params.cond_stage_config.params.embed_dim=16", "context_dim is 8, .* 16"),
        ("unet", "model.params.unet_config.params.in_channels=3", "in_channels is 3, .* 4"),
        ("unet", "model.params.unet_config.params.num_classes=3", "num_classes"), ("unet", "model.params.unet_config.params.image_size=null", "image_size"),
        ("unet", "model.params.cond_stage_config.params.n_classes=3", "train has 3 classes, the class embedder 2"),
        ("unet", "lightning.callbacks.image_logger.batch_frequency=0", "batch_frequency"), ("unet", "--seed=-1", "seed"),
        ("unet", "model.params.snr_gamma=5 model.params.l_simple_weight=0.5", "l_simple_weight"),
        ("unet", "model.params.snr_gamma=5 model.params.original_elbo_weight=0.1", "original_elbo_weight"),
        ("unet", "model.params.snr_gamma=5 model.params.learn_logvar=true", "learn_logvar"),
        ("unet", "--resume=x -t false", "-t false"), ("unet", "--export=x", "--export"),
        ("unet", "--resume=x --init-from=y", "--init-from"),
        ("vq", "model.params.no_such=1", "no_such"), ("vq", "model.params.lossconfig.params.no_such=1", "no_such"),
        ("vq", "model.params.lossconfig.params.disc_loss=vanilla", "disc_loss"), ("vq", "model.params.lossconfig.target=no_such", "no_such"),
        ("vq", "data.params.train.image_size=16", "resolution"), ("vq", "data.params.train.features=x", "pictures"),
        ("kl", "model.params.lossconfig.params.codebook_weight=1", "codebook_weight"), ("kl", "model.params.lossconfig.params.disc_num_layers=4", "disc_num"),
    ],
)  # fmt: skip
def test_what_is_unknown_or_does_not_fit_is_refused_by_its_name(kind: str, override: str, named: str, features: Path, pictures: Path, tmp_path: Path) -> None:
    content = unet_run(features) if kind == "unet" else first_stage_run(pictures, kind)
    with pytest.raises(InputError, match=named):
        where = [] if "--resume" in override else ["--run-dir", str(tmp_path / "run")]
        script.main(["--base", saved(tmp_path / "run.yaml", content), *override.split(), *where])
    assert not (tmp_path / "run").exists()


def test_what_lightning_refuses_is_one_sentence_and_what_our_code_raises_is_a_defect(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Lightning refused the run: .*val_check_interval"):
        build(unet_run(features, val_check_interval=99), tmp_path).fit(None)
    monkeypatch.setattr(LatentDiffusion, "training_step", lambda *args: int("no number"))
    with pytest.raises(ValueError, match="no number") as caught:
        build(unet_run(features), tmp_path).fit(None)
    assert not isinstance(caught.value, InputError)


def test_validation_data_may_not_have_more_classes_than_the_embedder(features: Path, tmp_path: Path) -> None:
    write_features(tmp_path / "few", np.zeros((4, 1, 8, 8, 8)), np.zeros(4), num_classes=1, vae="none", scaling_factor=1.0)
    content = unet_run(features)
    content["data"]["params"]["train"] = {"features": str(tmp_path / "few")}
    content["model"]["params"]["cond_stage_config"]["params"] |= {"n_classes": 2}
    with pytest.raises(InputError, match="validation has 3 classes, the class embedder 1"):
        build(content, tmp_path / "run")


def test_trainer_flags_are_numbers_where_they_look_like_one(capsys: pytest.CaptureFixture) -> None:
    values = {"1e4": 10_000, "1e-1": 0.1, "0.5": 0.5, "8": 8, "0,1": "0,1", "true": True, "00:01:00:00": "00:01:00:00", "bf16-mixed": "bf16-mixed"}
    assert {text: script.trainer_value(text) for text in values} == values
    with pytest.raises(SystemExit):
        script.parse_args(["-b", "x", "--precision", "["])
    assert "argument --precision" in capsys.readouterr().err


def test_overrides_may_stand_anywhere_and_files_merge_from_left_to_right(tmp_path: Path) -> None:
    files = [saved(tmp_path / f"{k}.yaml", {"model": {"a": k, f"b{k}": k}}) for k in range(2)]
    for line in (["-t", "model.c=2", "-b", *files], ["-b", *files, "model.c=2", "-t"], ["-b", files[0], "-b", files[1], "-t", "true", "model.c=2"]):
        args = script.parse_args(line)
        assert args.train
        assert read_yaml(args.base, args.overrides) == {"model": {"a": 1, "b0": 0, "b1": 1, "c": 2}}
    assert not script.parse_args(["-b", *files, "-t", "False"]).train
    assert script.parse_args(["-b", *files, "--max_steps", "1e4", "--max_time", "01:00:00:00", "--devices", "0,1"]).max_steps == 10_000
    with pytest.raises(InputError, match="--project"):
        script.parse_args(["-b", *files, "-p", "mine"])


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0, {"accelerator": "cpu", "devices": 1}), (2, {"accelerator": "gpu", "devices": 2}), ("0,1", {"accelerator": "gpu", "devices": [0, 1]}),
        ("3,", {"accelerator": "gpu", "devices": [3]}), (-1, {"accelerator": "gpu", "devices": -1}),
    ],
)  # fmt: skip
def test_gpus_is_the_old_word_for_accelerator_and_devices(gpus: object, expected: dict[str, object]) -> None:
    assert script.parse_args(["-b", "x", "--gpus", str(gpus)]).gpus == gpus
    assert modern({"gpus": gpus}) == expected


def test_help_lists_the_trainer_s_flags(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name} VALUE" in shown for name in script.TRAINER_FLAGS)


def test_no_arguments_at_all_get_one_sentence() -> None:
    with pytest.raises(InputError, match="no configuration; pass --base"):
        script.main([])
