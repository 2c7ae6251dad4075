"""Training of U-Nets and first stages: killed runs end as undisturbed ones, checkpoints have CompVis' names, and a run goes on as it was begun."""

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
from ldm_runs import LOSS, UNET, build, first_stage_run, saved, unet_run, write_run_features, write_run_pictures
from PIL import Image
from torch import Tensor

import ldm.callbacks
from ldm import main as script
from ldm.checkpoints import compvis_state_dict, load_ldm_denoisers, load_ldm_first_stage, read_ldm, read_ldm_first_stage
from ldm.data import FixedLoader, Pixels
from ldm.experiment import Experiment
from ldm.first_stage_training import FirstStageLoss, FirstStageTraining, PatchDiscriminator
from ldm.training import CompVisModule, LatentDiffusion, lr_factor
from tstitch.cli import run
from tstitch.data import write_features
from tstitch.errors import InputError
from tstitch.pictures import ImageFolder
from tstitch.presets import ROOT

# Imports once; every run is then a process of its own, which may be killed.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["ldm.main", "diffusers.models.autoencoders.vq_model", "diffusers.models.unets.unet_2d_condition"])


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_pictures(tmp_path_factory.mktemp("pictures"))


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
