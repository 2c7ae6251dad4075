"""Weights in and out: nothing unsafe is read, nothing unfit is loaded, and the file says what is wrong."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import tiny_dit

from dit.checkpoints import build_dit, load_dit
from tstitch.checkpoints import read_weights, save_weights
from tstitch.errors import InputError
from tstitch.files import atomic_path


def test_weights_come_back_with_their_configuration(tmp_path: Path) -> None:
    model = tiny_dit(1, posenc="rope")
    save_weights(tmp_path / "m.safetensors", model.state_dict(), model.config, dtype=torch.float32)
    loaded = load_dit(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(a, loaded.state_dict()[k]) for k, a in model.state_dict().items())


def test_a_published_training_checkpoint_gives_its_moving_average(tmp_path: Path) -> None:
    model, ema = tiny_dit(1), tiny_dit(2)
    path = tmp_path / "0050000.pt"
    torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "opt": {}, "args": argparse.Namespace(model="DiT-S/2")}, path)
    state, config = read_weights(path)
    assert config == {}
    assert all(torch.equal(state[k], v) for k, v in ema.state_dict().items())


def test_a_bare_published_state_dict_loads_by_name(tmp_path: Path) -> None:
    model = build_dit("DiT-S/8", input_size=16, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "s.pt")
    assert load_dit(tmp_path / "s.pt", "DiT-S/8", input_size=16, num_classes=5).num_classes == 5
    with pytest.raises(InputError, match="name its size"):
        load_dit(tmp_path / "s.pt")


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "evil.pt", "wb") as file:
        pickle.dump({"model": Bomb(str(tmp_path / "ran"))}, file)
    torch.save({"model": Bomb(str(tmp_path / "ran"))}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match="not loaded"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0, 7, 2000])
def test_a_truncated_file_is_named_and_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"m.{suffix}"
    model = tiny_dit(1)
    if suffix == "pt":
        torch.save(model.state_dict(), path)
    else:
        save_weights(path, model.state_dict(), model.config)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=str(path)):
        load_dit(path)


def test_weights_of_another_size_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    torch.save(tiny_dit(1).state_dict(), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"pos_embed is \[1, 16, 32\], the model has \[1, 16, 384\]"):
        load_dit(tmp_path / "m.pt", "DiT-S/2", input_size=8, num_classes=10)


def test_a_missing_file_says_where_weights_come_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="readme.txt"):
        read_weights(tmp_path / "none.pt")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
