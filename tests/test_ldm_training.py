"""Training of U-Nets and first stages: killed runs end as undisturbed ones, checkpoints have CompVis' names, and the command line means what LDM's did."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest  # noqa: F401  (also in the processes started here: it makes torchvision importable)
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from torch import Tensor

import ldm.callbacks
from assets.emoji.emoji_data import load_drawings
from ldm import main as script
from ldm.checkpoints import compvis_state_dict, load_ldm_denoisers, load_ldm_first_stage, read_ldm, read_ldm_first_stage
from ldm.config import read_autoencoder, read_model, read_yaml
from ldm.data import FixedLoader, Pixels
from ldm.experiment import Experiment, build_experiment, modern
from ldm.first_stage_training import FirstStageLoss, FirstStageTraining, PatchDiscriminator
from ldm.networks import build_ldm_first_stage, build_ldm_unet
from ldm.training import CompVisModule, LatentDiffusion, lr_factor
from tstitch.cli import run
from tstitch.data import write_features
from tstitch.errors import InputError
from tstitch.pictures import ImageFolder
from tstitch.presets import ROOT

# Imports once; every run is then a process of its own, which may be killed.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["ldm.main", "diffusers.models.autoencoders.vq_model", "diffusers.models.unets.unet_2d_condition"])
UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [], "num_res_blocks": 1, "channel_mult": [1],
    "num_heads": 2, "use_spatial_transformer": True, "context_dim": 8,
}  # fmt: skip
DDCONFIG = {
    "double_z": False, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
    "attn_resolutions": [], "attn_type": "none",
}  # fmt: skip
LOSS = {"disc_start": 3, "perceptual_weight": 0.0, "disc_num_layers": 1, "disc_ndf": 8}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-six items of three unequal classes; their latents are nearly constant."""
    folder = tmp_path_factory.mktemp("features")
    labels = np.repeat([0, 1, 2], [13, 8, 5])
    mean = np.broadcast_to((labels - 1.0)[:, None, None, None], (26, 4, 8, 8))
    moments = np.concatenate([mean, np.full_like(mean, -8.0)], axis=1)[:, None]
    write_features(folder, moments, labels, num_classes=3, vae="none", scaling_factor=1.0)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten emoji in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, image in enumerate(load_drawings(ROOT / "assets" / "emoji" / "sample64.npz", held_out=False).images[:10]):
        (folder / str(k % 2)).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / str(k % 2) / f"{k}.png")
    return folder


def unet_run(features: Path, **trainer: Any) -> dict[str, Any]:
    """A configuration of three steps an epoch; validation after each, a checkpoint every two."""
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, "channels": 4, "monitor": "val/loss_simple_ema",
        "scheduler_config": {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": {"warm_up_steps": 3, "max_decay_steps": 40}},
        "unet_config": {"target": "ldm.UNetModel", "params": UNET},
        "first_stage_config": {"target": "tstitch.autoencoder.Autoencoder", "params": {"ckpt_path": "pretrained_models/emoji/vae"}},
        "cond_stage_config": {"target": "ldm.ClassEmbedder", "params": {"embed_dim": 8, "n_classes": 4, "ucg_rate": 0.25}},
    }  # fmt: skip
    data = {"batch_size": 4, "class_balance": 0.5, "train": {"features": str(features)}, "validation": {"features": str(features)}}
    return _configuration({"base_learning_rate": 1e-4, "target": "ldm.LatentDiffusion", "params": params}, data, trainer)


def first_stage_run(pictures: Path, kind: str, **trainer: Any) -> dict[str, Any]:
    """A configuration of a VQ or KL first stage whose discriminator begins at step 3."""
    names = {"vq": ("VQModel", "VQLPIPSWithDiscriminator"), "kl": ("AutoencoderKL", "LPIPSWithDiscriminator")}[kind]
    params = {
        "embed_dim": 4, "ddconfig": DDCONFIG | {"double_z": kind == "kl"}, "use_ema": True, "monitor": "val/rec_loss",
        "lossconfig": {"target": f"ldm.{names[1]}", "params": LOSS | ({"kl_weight": 1e-6} if kind == "kl" else {})},
    } | ({"n_embed": 16} if kind == "vq" else {})  # fmt: skip
    source = {"pictures": str(pictures), "image_size": 32}
    model = {"base_learning_rate": 1.25e-4, "target": f"ldm.models.autoencoder.{names[0]}", "params": params}
    return _configuration(model, {"batch_size": 2, "train": source, "validation": source}, trainer)


def _configuration(model: dict, data: dict, trainer: dict) -> dict[str, Any]:
    common = {"accelerator": "cpu", "max_steps": 7, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "enable_progress_bar": False}
    lightning = {"modelcheckpoint": {"params": {"every_n_train_steps": 2}}, "trainer": common | trainer}
    return {"model": model, "data": {"params": data}, "lightning": lightning}


def saved(path: Path, content: dict[str, Any]) -> str:
    """Path of a yaml with this content."""
    path.write_text(yaml.safe_dump(content))
    return str(path)


def last(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def log_rows(folder: Path) -> list[dict[str, float]]:
    """A run's log without rates."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "steps_per_s"} for row in rows]


def leaves(content: Any, name: str = "") -> dict[str, Any]:
    """Nested content as {path: value}, tensors as lists."""
    if isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {key: value for part, inside in items for key, value in leaves(inside, f"{name}.{part}").items()}
    return {name: content.tolist() if isinstance(content, Tensor) else content}


# Kills


def run_in_process(arguments: list[str], die: tuple[str, int] | None = None) -> int:
    """Exit code of ldm/main.py in a process of its own, which may end itself: at the n-th "step", "validation" or "write" of a checkpoint, or by Ctrl-C."""
    process = FORKED.Process(target=_child, args=(arguments, die))
    process.start()
    process.join()
    return process.exitcode


def _child(arguments: list[str], die: tuple[str, int] | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it, and its children inherit that
    torch.set_num_threads(1)
    os.chdir(ROOT)
    calls = 0

    def dying(function: Callable) -> Callable:
        def called(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == die[1]:
                if die[0] == "write":
                    Path(args[1]).write_bytes(b"half a checkpoint")
                os.kill(os.getpid(), signal.SIGINT if die[0] == "Ctrl-C" else signal.SIGKILL)
            return function(*args)

        return called

    if die is not None and die[0] in ("step", "Ctrl-C"):
        for module in (LatentDiffusion, FirstStageTraining):
            module.training_step = dying(module.training_step)
    elif die is not None and die[0] == "validation":
        CompVisModule.validation_step = dying(CompVisModule.validation_step)
    elif die is not None:
        ldm.callbacks.torch.save = dying(torch.save)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        run(lambda: script.main(arguments))


@pytest.mark.parametrize("kind", ["unet", "vq"])
def test_a_run_killed_again_and_again_ends_with_the_weights_and_the_log_of_an_undisturbed_one(
    kind: str, features: Path, pictures: Path, tmp_path: Path
) -> None:
    content = unet_run(features, gradient_clip_val=1.0) if kind == "unet" else first_stage_run(pictures, "vq")
    if kind == "unet":
        content["model"]["params"]["unet_config"]["params"] = UNET | {"dropout": 0.1}
    arguments = ["--base", saved(tmp_path / "run.yaml", content), "-t", "--run-dir"]
    assert run_in_process([*arguments, str(tmp_path / "whole")]) == 0
    killed = [*arguments, str(tmp_path / "killed")]
    # Before the first checkpoint, while it is written, in the middle of an epoch, in the validation that belongs to a checkpoint, in the last write.
    for die in (("step", 3), ("write", 1), ("step", 8), ("Ctrl-C", 3), ("validation", 9), ("write", 3)):
        assert run_in_process(killed, die) == (130 if die[0] == "Ctrl-C" else -signal.SIGKILL)
    assert run_in_process(killed) == 0
    a, b = (last(tmp_path / run) for run in ("whole", "killed"))
    assert a["global_step"] == 7
    for part in ("state_dict", "optimizer_states", "lr_schedulers", *(["ema"] if kind == "vq" else [])):
        assert leaves(a[part]) == leaves(b[part])
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "killed")
    files = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "killed")]
    assert files[0] == files[1]
    assert len(files[0]) == (3 if kind == "unet" else 4)  # last.ckpt and one for each validation


# Steps


def build(content: dict[str, Any], folder: Path, **options: Any) -> Experiment:
    """An experiment of a configuration, with the script's own defaults."""
    return build_experiment(content, folder, {}, **({"seed": 23, "scale_lr": True} | options))


class Recorder(pl.Callback):
    """The weights of the network after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: CompVisModule, *args: Any) -> None:
        self.weights.append({name: value.double() for name, value in compvis_state_dict(pl_module.network).items()})


@pytest.fixture(scope="module")
def trained(features: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Recorder, dict[str, Tensor]]:
    """A U-Net trained for seven steps, with its weights before and after each."""
    content = unet_run(features, accumulate_grad_batches=1)
    content["lightning"]["modelcheckpoint"]["params"]["save_top_k"] = 1
    content["lightning"]["callbacks"] = {"image_logger": {"batch_frequency": 5, "max_images": 4, "num_steps": 2}}
    experiment, recorder = build(content, tmp_path_factory.mktemp("trained")), Recorder()
    before = {name: value.double() for name, value in compvis_state_dict(experiment.model.network).items()}
    experiment.trainer.callbacks.append(recorder)
    experiment.fit(experiment.folder / "export.safetensors")
    return experiment, recorder, before


def test_the_moving_average_is_that_of_ldm(trained: tuple) -> None:
    experiment, recorder, shadow = trained
    for n, weights in enumerate(recorder.weights, start=1):
        decay = min(0.9999, (1 + n) / (10 + n))
        shadow = {name: decay * shadow[name] + (1 - decay) * weights[name] for name in shadow}
    parts = read_ldm(experiment.folder / "checkpoints" / "last.ckpt")
    assert all((parts.ema[0][name] - shadow[name]).abs().max() < 1e-6 for name in shadow)
    assert (int(parts.buffers["model_ema.num_updates"]), float(parts.buffers["model_ema.decay"])) == (7, pytest.approx(0.9999))


def test_a_checkpoint_has_compvis_names_and_is_what_the_samplers_load(trained: tuple) -> None:
    experiment, recorder, _ = trained
    state = last(experiment.folder)["state_dict"]
    unet = {f"model.diffusion_model.{name}": name for name in recorder.weights[-1]}
    ema = {f"model_ema.diffusion_model{name.replace('.', '')}" for name in recorder.weights[-1]}
    assert state.keys() == unet.keys() | ema | {"cond_stage_model.embedding.weight", "model_ema.decay", "model_ema.num_updates"}
    assert {"model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelout2bias"} <= state.keys()
    assert all(torch.equal(state[key].double(), recorder.weights[-1][name]) for key, name in unet.items())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 3])
    expected = experiment.model.averaged.eval()(x, t, y)
    for file, near in (("checkpoints/last.ckpt", 0), ("export.safetensors", 2e-2)):  # fp16
        (loaded,) = load_ldm_denoisers(experiment.folder / file, [UNET], num_classes=3)
        assert (loaded(x, t, y) - expected).abs().max() <= near


def test_pictures_are_drawn(trained: tuple) -> None:
    assert Image.open(trained[0].folder / "images" / "0000005.png").size[0] > 4 * 32


def test_the_best_checkpoint_is_the_one_with_the_smallest_measure(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: CompVisModule, batch: object, batch_idx: int) -> None:
        self.log_dict(dict.fromkeys(self.validated, {2: 0.3, 4: 0.1, 6: 0.2}[self.steps_done]), batch_size=1)

    monkeypatch.setattr(CompVisModule, "validation_step", measure)
    content = unet_run(features, accumulate_grad_batches=1, max_steps=6, val_check_interval=2)
    content["lightning"]["modelcheckpoint"]["params"]["save_top_k"] = 1
    build(content, tmp_path).fit(None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch=000000-step=0000004.ckpt", "last.ckpt"]


class Stopper(pl.Callback):
    """Ends a run as max_time does, after the third batch: in the middle of the second step."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: CompVisModule, outputs: object, batch: object, batch_idx: int) -> None:
        trainer.should_stop = batch_idx == 2


def test_a_run_that_time_ends_between_the_parts_of_a_step_finishes_the_step_and_goes_on_to_the_same_weights(features: Path, tmp_path: Path) -> None:
    content = unet_run(features, max_steps=3)
    content["lightning"]["modelcheckpoint"]["params"]["every_n_train_steps"] = 100
    del content["data"]["params"]["validation"]
    build(content, tmp_path / "whole").fit(None)
    ended = build(content, tmp_path / "ended")
    ended.trainer.callbacks.insert(0, Stopper())
    ended.fit(None)
    assert last(tmp_path / "ended")["global_step"] == 2
    build(content, tmp_path / "ended", resumed=tmp_path / "ended" / "checkpoints" / "last.ckpt").fit(None)
    a, b = (last(tmp_path / run) for run in ("whole", "ended"))
    assert all(leaves(a[part]) == leaves(b[part]) for part in ("state_dict", "optimizer_states"))


def test_a_checkpoint_holds_the_mean_of_every_process_s_sums(tmp_path: Path) -> None:
    log = ldm.callbacks.LossLog(tmp_path / "log.jsonl")
    log.sums, log._strategy = {"loss": torch.tensor(3.0)}, SimpleNamespace(reduce=lambda value, reduce_op: (value + 5) / 2)
    assert log.state_dict()["sums"] == {"loss": 4.0}
    assert log.sums == {"loss": 3.0}


@pytest.mark.parametrize("about", [{"vae_hash": "0123"}, {"scaling_factor": 0.5}])
def test_features_of_another_first_stage_are_refused(about: dict[str, Any], tmp_path: Path) -> None:
    write_features(tmp_path / "f", np.zeros((4, 1, 8, 8, 8)), np.arange(4) % 3, num_classes=3, **({"vae": "other", "scaling_factor": 1.0} | about))
    with pytest.raises(InputError, match="first stage"):
        build(unet_run(tmp_path / "f"), tmp_path / "run")


def test_pictures_are_encoded_where_training_is_by_the_autoencoder_that_draws(pictures: Path, tmp_path: Path) -> None:
    content = unet_run(tmp_path)
    content["data"]["params"] |= {part: {"pictures": str(pictures), "image_size": 32} for part in ("train", "validation")}
    experiment = build(content, tmp_path)
    data, logger = experiment.data, next(callback for callback in experiment.trainer.callbacks if isinstance(callback, ldm.callbacks.ImageLogger))
    assert data.train.autoencoder is data.validation.autoencoder is logger.autoencoder is data.autoencoder
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    data.setup("fit")
    assert {tensor.device.type for tensor in data.autoencoder.vae.state_dict().values()} == {data.autoencoder.device.type} == {"meta"}


def test_two_devices_train_as_one_that_accumulates_twice(features: Path, tmp_path: Path) -> None:
    arguments = ["--base", saved(tmp_path / "run.yaml", unet_run(features, max_steps=3)), "-t", "--run-dir"]
    two = ["--devices", "2", "--strategy", "ddp", "--accumulate_grad_batches", "1"]
    command = [sys.executable, str(ROOT / "ldm" / "main.py"), *arguments, str(tmp_path / "two"), *two]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run_in_process([*arguments, str(tmp_path / "one")]) == 0
    one, both = last(tmp_path / "one")["state_dict"], last(tmp_path / "two")["state_dict"]
    assert all((one[name] - both[name]).abs().max() < 1e-5 for name in one)
    rows = [[row.get("loss", row.get("val/loss_simple")) for row in log_rows(tmp_path / run)] for run in ("one", "two")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)
    assert not {"litlogger", "GPU available", "TPU", "Warning"} & {word for word in ("litlogger", "GPU available", "TPU", "Warning") if word in done.stderr}


@pytest.mark.parametrize(("accumulation", "scale_lr", "factor"), [(1, True, 4), (3, True, 12), (3, False, 1)])
def test_the_learning_rate_counts_accumulation_devices_and_batch(accumulation: int, scale_lr: bool, factor: int, features: Path, tmp_path: Path) -> None:
    experiment = build(unet_run(features, accumulate_grad_batches=accumulation), tmp_path, scale_lr=scale_lr)
    assert experiment.model.learning_rate == pytest.approx(factor * 1e-4)


def test_the_schedule_warms_up_and_falls_along_a_cosine(trained: tuple) -> None:
    rates = {row["step"]: row["lr"] for row in log_rows(trained[0].folder) if "lr" in row}
    factor = {2: 1.0, 4: 0.5 * (1 + math.cos(math.pi / 37)), 7: 0.5 * (1 + math.cos(math.pi * 4 / 37))}  # of the step that comes next
    assert all(rates[step] == pytest.approx(4e-4 * value, rel=1e-5) for step, value in factor.items())
    floor = lr_factor({"target": "x.LambdaWarmUpCosineScheduler", "params": {"max_decay_steps": 10, "lr_max": 2.0, "lr_min": 0.5}})
    assert (floor(0), floor(10), floor(99)) == (2.0, 0.5, 0.5)


def test_dropped_labels_teach_the_null_row_in_training_only(trained: tuple) -> None:
    model = trained[0].model
    batch = (torch.randn(16, 4, 8, 8), torch.zeros(16, dtype=torch.long), 5)
    for training in (True, False):
        model.train(training).zero_grad()
        model.losses(model.denoiser, batch)["loss"].backward()
        reached = model.denoiser.embedder.weight.grad.abs().sum(dim=1) > 0
        assert reached.tolist() == [True, False, False, training]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_draws_are_fixed_and_shared_out_among_processes(world: int, pictures: Path) -> None:
    data = Pixels(ImageFolder(pictures, 16), flip=True)
    loaders = [FixedLoader(data, 3, 7, SimpleNamespace(world_size=world, global_rank=rank)) for rank in range(world)]
    torch.manual_seed(world)  # draws do not depend on it
    batches = sorted((batch for loader in loaders for batch in [*loader, *loader]), key=lambda batch: batch[2])
    whole = sorted(FixedLoader(data, 3, 7, SimpleNamespace(world_size=1, global_rank=0)), key=lambda batch: batch[2])
    assert len(batches) == 2 * len(whole) == 8
    assert all(torch.equal(x, whole[k // 2][0]) and seed == whole[k // 2][2] for k, (x, _, seed) in enumerate(batches))
    with pytest.raises(InputError, match="batch_size"):
        FixedLoader(data, 10, 7, SimpleNamespace(world_size=2, global_rank=0))


# First stages


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_first_stage_learns_and_its_checkpoint_is_read_as_compvis_own(kind: str, pictures: Path, tmp_path: Path) -> None:
    content = first_stage_run(pictures, kind, max_steps=30, accumulate_grad_batches=1, val_check_interval=5, log_every_n_steps=5)
    content["model"]["params"] |= {"ema_decay": 0.9}
    content["model"]["params"]["lossconfig"]["params"] = LOSS | {"disc_start": 20, "disc_weight": 0.1} | ({"kl_weight": 1e-6} if kind == "kl" else {})
    content["model"]["base_learning_rate"] = 1e-3
    content["lightning"]["callbacks"] = {"image_logger": {"batch_frequency": 30, "max_images": 10}}
    experiment = build(content, tmp_path / "run")
    x = experiment.data.train.latents(torch.arange(4))
    untrained = (experiment.model.reconstruct(experiment.model.network, x)[0] - x).abs().mean()
    experiment.fit(tmp_path / "export.safetensors")
    measured = [row["val/rec_loss_ema"] for row in log_rows(tmp_path / "run") if "val/rec_loss_ema" in row]
    assert len(measured) == 6
    assert measured[-1] < 0.8 * measured[0] < 0.8 * untrained
    disc = {row["step"]: row["disc_loss"] for row in log_rows(tmp_path / "run") if "disc_loss" in row}
    assert [value > 0 for value in disc.values()] == [step > 20 for step in disc]
    model, path = experiment.model.eval(), tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {"encoder.conv_in.weight", "decoder.conv_out.bias", "post_quant_conv.weight", "loss.discriminator.main.0.weight"} <= state.keys()
    assert state.keys() == compvis_state_dict(model.network).keys() | {f"loss.discriminator.{name}" for name in model.loss.discriminator.state_dict()}
    expected, _ = model.reconstruct(model.averaged, x)
    loaded = load_ldm_first_stage(read_ldm_first_stage(path), experiment.model.config.params, kind)
    assert torch.equal(model.reconstruct(loaded, x)[0], expected)
    exported = load_ldm_first_stage(read_ldm_first_stage(tmp_path / "export.safetensors"), experiment.model.config.params, kind)
    if kind == "kl":  # a code may flip in fp16
        assert (model.reconstruct(exported, x)[0] - expected).abs().max() < 2e-2
    sheet = Image.open(tmp_path / "run" / "images" / "0000030.png")
    assert sheet.size[1] > 4 * 32  # two rows of pictures, each above its reconstructions
    assert build(content, tmp_path / "next", init_from=path).model.network.state_dict().keys() == loaded.state_dict().keys()


def test_generator_and_discriminator_are_balanced_and_learn_apart() -> None:
    torch.manual_seed(0)
    loss = FirstStageLoss("vq", LOSS | {"disc_in_channels": 3, "disc_weight": 0.5, "disc_factor": 1.0, "pixelloss_weight": 1.0, "codebook_weight": 1.0}, 32)
    decoder, x = torch.nn.Conv2d(3, 3, 3, padding=1), torch.rand(2, 3, 32, 32)
    x_hat = decoder(x)
    terms = loss.reconstruction(x, x_hat, torch.tensor(0.25))
    assert terms["loss"].item() == pytest.approx((x - x_hat).abs().mean().item() + 0.25)
    more = loss.adversarial(x, x_hat, terms["nll"], decoder.weight)
    of_nll, of_g = (torch.autograd.grad(term, decoder.weight, retain_graph=True)[0].norm() for term in (terms["nll"], more["g_loss"]))
    assert more["d_weight"] == pytest.approx((of_nll / (of_g + 1e-4)).item())
    more["added"].backward(retain_graph=True)
    assert decoder.weight.grad.norm() == pytest.approx((0.5 * more["d_weight"] * of_g).item(), rel=1e-4)  # nothing of the discriminator's loss
    own = [parameter.grad.clone() for parameter in loss.discriminator.parameters()]
    for parameter, expected in zip(loss.discriminator.parameters(), own, strict=True):
        assert torch.allclose(torch.autograd.grad(more["disc_loss"], parameter, retain_graph=True)[0], expected, atol=1e-6)  # nothing of the generator's
    assert PatchDiscriminator()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_without_weights_the_perceptual_term_is_refused(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    content = first_stage_run(pictures, "vq")
    content["model"]["params"]["lossconfig"]["params"] = {"disc_start": 5}
    with pytest.raises(InputError, match=f"{tmp_path}.*perceptual_weight=0"):
        build(content, tmp_path / "run")


# Configurations and command line


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


def test_a_run_goes_on_as_it_was_begun_or_says_what_differs(trained: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    experiment = trained[0]
    again = ["-b", str(experiment.folder / "config.yaml"), "-t", "--run-dir", str(experiment.folder)]
    before = (experiment.folder / "log.jsonl").read_text()
    script.main(again)
    assert "finished at step 7" in capsys.readouterr().out
    assert (experiment.folder / "log.jsonl").read_text() == before
    with pytest.raises(InputError, match=r"model\.params\.snr_gamma=None, run\.seed=23"):
        script.main([*again, "model.params.snr_gamma=5.0", "--seed", "3", "--max_steps", "9"])
    with pytest.raises(InputError, match=r"run\.init_from=None"):
        script.main([*again, "--init-from", "other.ckpt"])
    with pytest.raises(InputError, match="step 7 already"):
        script.main(["--resume", str(experiment.folder), "--max_steps", "5"])
    script.main(["--resume", str(experiment.folder), "--max_steps", "8", "lightning.modelcheckpoint.params.every_n_train_steps=100"])
    assert last(experiment.folder)["global_step"] == 8
    with pytest.raises(InputError, match="no checkpoints/last.ckpt"):
        script.main(["--resume", str(tmp_path)])
    damaged = tmp_path / "checkpoints" / "last.ckpt"
    damaged.parent.mkdir()
    damaged.write_bytes((experiment.folder / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    saved(tmp_path / "config.yaml", dict(experiment.content))
    with pytest.raises(InputError, match=f"{damaged} is damaged"):
        script.main(["--resume", str(tmp_path)])


def test_a_run_begins_with_the_weights_that_it_is_given(trained: tuple, tmp_path: Path) -> None:
    experiment = trained[0]
    path = experiment.folder / "checkpoints" / "last.ckpt"
    parts, begun = read_ldm(path), build(dict(experiment.content), tmp_path, init_from=path).model
    assert leaves(compvis_state_dict(begun.network)) == leaves(parts.unets[0])
    assert leaves(compvis_state_dict(begun.average)) == leaves(parts.ema[0])
    named = {**experiment.content, "model": experiment.content["model"] | {"params": experiment.content["model"]["params"] | {"ckpt_path": str(path)}}}
    assert leaves(compvis_state_dict(build(named, tmp_path).model.network)) == leaves(parts.unets[0])


def test_no_arguments_at_all_get_one_sentence() -> None:
    with pytest.raises(InputError, match="no configuration; pass --base"):
        script.main([])
