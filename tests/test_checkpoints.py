"""Weights in and out: nothing unsafe is read, nothing unfit is loaded, and the file says what is wrong."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, tiny_dit
from safetensors.torch import save_file
from torch import Tensor

from dit.checkpoints import load_dit
from dit.models import DiT, DiT_models, sincos_position_embedding
from tstitch import files, presets
from tstitch.checkpoints import convert as conversion
from tstitch.checkpoints import doctor, layouts, load_strict, read_weights, save_weights
from tstitch.checkpoints.__main__ import main
from tstitch.checkpoints.convert import convert
from tstitch.cli import run
from tstitch.errors import InputError
from tstitch.files import atomic_path


def test_weights_come_back_with_their_configuration(tmp_path: Path) -> None:
    model = tiny_dit(1, posenc="rope")
    save_weights(tmp_path / "m.safetensors", model.state_dict(), model.config, dtype=torch.float32)
    loaded = load_dit(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(a, loaded.state_dict()[k]) for k, a in model.state_dict().items())


def test_weights_that_fp16_cannot_hold_are_not_written(tmp_path: Path) -> None:
    state = {"small": torch.ones(2), "large": torch.tensor([1.0, 7e4])}
    with pytest.raises(InputError, match="large holds weights too large for float16"):
        save_weights(tmp_path / "m.safetensors", state, {})
    assert not list(tmp_path.iterdir())
    save_weights(tmp_path / "m.safetensors", state, {}, dtype=torch.float32)


def test_a_published_training_checkpoint_gives_its_moving_average(tmp_path: Path) -> None:
    model, ema = tiny_dit(1), tiny_dit(2)
    path = tmp_path / "0050000.pt"
    torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "opt": {}, "args": argparse.Namespace(model="DiT-S/2")}, path)
    state, config = read_weights(path)
    assert config == {}
    assert all(torch.equal(state[k], v) for k, v in ema.state_dict().items())


def test_a_bare_published_state_dict_says_by_its_shapes_what_it_is(tmp_path: Path) -> None:
    model = bare_dit(tmp_path / "s.pt")
    assert load_dit(tmp_path / "s.pt").config == model.config


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
    with pytest.raises(InputError, match="another size .hidden_size 32, DiT-S/2 has 384; depth 2"):
        load_dit(tmp_path / "m.pt", "DiT-S/2", input_size=8, num_classes=10)
    model, state = tiny_dit(1), tiny_dit(1, width=24).state_dict()
    with pytest.raises(InputError, match=r"pos_embed is \[1, 16, 24\], the model has \[1, 16, 32\]"):
        load_strict(model, state, "m.pt")


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


def test_a_write_opens_no_folder_where_the_system_opens_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", SimpleNamespace(**vars(os) | {"name": "nt", "open": lambda *how: pytest.fail("opened a folder")}))
    files.write_json(tmp_path / "a.json", [1])
    assert files.read_json(tmp_path / "a.json") == [1]


def test_a_path_that_cannot_become_a_file_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_file(tmp_path / "new" / "a.json")
    (tmp_path / "a.json").write_text("[]")
    files.check_file(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    for folder in (tmp_path, Path(), Path("/")):  # the last two have no name
        with pytest.raises(InputError, match="is a folder; name a file$|is not writable"):
            files.check_file(folder)
    with pytest.raises(InputError, match="a.json is a file; choose another folder"):
        files.check_file(tmp_path / "a.json" / "b.json")
    for name in ("x" * 300, "x" * 250):  # the second leaves no room for the temporary name
        with pytest.raises(InputError, match="File name too long"):
            files.check_file(tmp_path / name)
    with pytest.raises(InputError, match="File name too long"):
        files.check_folder(tmp_path / ("x" * 300) / "out")

    def forbidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(InputError, match="Permission denied; choose another path"):
        files.check_folder(tmp_path / "out")


def test_what_cannot_be_read_as_json_is_refused_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        files.read_json(tmp_path)
    with pytest.raises(InputError, match="File name too long"):
        files.read_json(tmp_path / ("x" * 300))


def says(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Run the command line and return the sentence it refuses with."""
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main([str(a) for a in arguments]))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.startswith("error: ") and "\n" not in error
    return error


# What a file holds that is a dictionary but no checkpoint, or one whose trainer says nothing usable; and what is answered, if not its tensors.
WEIGHT = {"w": torch.ones(2)}
ODD = {
    "numbers for names": ({0: torch.ones(2)}, "keys such as 0"),
    "numbers for names inside": ({"model": {0: torch.ones(2)}}, "no state dict of named tensors"),
    "a list of arguments": ({"args": [1, 2], "model": WEIGHT}, None),
    "arguments without names": ({"args": {1: 2}, "model": WEIGHT}, None),
    "a number for a configuration": ({"args": {"model_config": 3}, "model": WEIGHT}, None),
    "a number for a status": ({"status": 3, "model": WEIGHT}, None),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_gets_one_sentence_or_is_read_for_its_tensors_alone(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content, sentence = ODD[case]
    torch.save(content, tmp_path / "odd.pt")
    if sentence:
        assert sentence in says(capsys, "inspect", tmp_path / "odd.pt")
    else:
        assert read_weights(tmp_path / "odd.pt")[1] == {}
        main(["inspect", str(tmp_path / "odd.pt"), "--json"])
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["layout"], found["tensors"], found["config"]) == ("unknown", 1, None)
        assert "is not a DiT: it has w" in says(capsys, "convert", tmp_path / "odd.pt", "--out", tmp_path / "out.safetensors")


@pytest.mark.parametrize("config", ["[1]", "null", "3"])
def test_a_header_that_is_no_configuration_is_as_none(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = published_width(3)
    save_file(model.state_dict(), tmp_path / "m.safetensors", {"config": config})
    main(["inspect", str(tmp_path / "m.safetensors"), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["layout"] == "DiT" and found["config"] == model.config


def test_a_trainer_s_words_of_another_kind_are_left_out(tmp_path: Path) -> None:
    model = published_width(3)
    torch.save({"model": model.state_dict(), "args": {"image_size": "64", "num_classes": None, "posenc": 3}}, tmp_path / "m.pt")
    assert load_dit(tmp_path / "m.pt").config == model.config


def test_a_name_that_is_too_long_or_a_folder_is_refused_before_the_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "File name too long" in says(capsys, "inspect", tmp_path / ("x" * 300))
    (tmp_path / "out.safetensors").mkdir()
    monkeypatch.setattr(conversion, "read_checkpoint", lambda path: pytest.fail("read"))
    assert "out.safetensors is a folder; name a file" in says(capsys, "convert", tmp_path / "m.pt", "--out", tmp_path / "out.safetensors")


def published_width(seed: int, **changes: object) -> DiT:
    """A DiT of a published width, so that its heads are known, but of two blocks, so that it is made quickly."""
    return tiny_dit(seed, **{"input_size": 16, "patch_size": 8, "width": 384, "num_heads": 6, "num_classes": 5, **changes})


# Each makes a file of another project around the weights of a model, and returns the model that its conversion must equal.
def bare_dit(path: Path) -> DiT:
    model = published_width(3)
    torch.save(model.state_dict(), path)
    return model


def fast_dit(path: Path) -> DiT:
    model, ema = published_width(4), published_width(5)
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": wrapped, "ema": ema.state_dict(), "opt": {}, "args": argparse.Namespace(model="DiT-S/8", num_classes=5)}, path)
    return ema


def gta(path: Path) -> DiT:
    model = tiny_dit(6, posenc="gta")
    arguments = argparse.Namespace(posenc="gta", image_size=64, num_classes=10)
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "opt": {}, "args": arguments, "status": {"epoch": 2, "train_steps": 7}}, path)
    return model


def repa(path: Path) -> DiT:
    model = published_width(7, learn_sigma=False)
    heads = {"projectors.0.0.weight": torch.ones(4, 384), "projectors.0.0.bias": torch.ones(4)}
    arguments = argparse.Namespace(model="SiT-S/8", resolution=128, num_classes=5, cfg_prob=0.1, path_type="linear", prediction="v")
    torch.save({"model": {}, "ema": model.state_dict() | heads, "opt": {}, "args": arguments, "steps": 400}, path)
    return model


@pytest.mark.parametrize("kind", [bare_dit, fast_dit, gta, repa])
def test_a_checkpoint_of_another_project_becomes_one_of_ours(tmp_path: Path, kind: Callable[[Path], DiT]) -> None:
    model = kind(tmp_path / "0000400.pt")
    main(["convert", str(tmp_path / "0000400.pt"), "--out", str(tmp_path / "out.safetensors")])
    converted = load_dit(tmp_path / "out.safetensors")
    assert converted.config == model.config
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_raw_weights_are_converted_where_they_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fast_dit(tmp_path / "1.pt")
    states = {use: convert(tmp_path / "1.pt", tmp_path / f"{use}.safetensors", use=use).state for use in ("ema", "model")}
    assert not any(torch.equal(value, states["model"][name]) for name, value in states["ema"].items() if name.endswith("weight"))
    bare_dit(tmp_path / "bare.pt")
    assert "holds no ema weights" in says(capsys, "convert", tmp_path / "bare.pt", "--out", tmp_path / "x.safetensors", "--use", "ema")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(("flag", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_number_type_is_the_one_asked_for(tmp_path: Path, flag: str, dtype: torch.dtype) -> None:
    bare_dit(tmp_path / "s.pt")
    main(["convert", str(tmp_path / "s.pt"), "--out", str(tmp_path / "s.safetensors"), "--dtype", flag])
    assert {value.dtype for value in read_weights(tmp_path / "s.safetensors")[0].values()} == {dtype}


def diffusers_dit(folder: Path, sharing: bool = True) -> torch.nn.Module:
    """A random DiTTransformer2DModel, saved in `folder`; `sharing`: all blocks have the first one's embedders, as in converted DiTs."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, out_channels=8, num_layers=3, sample_size=8, num_embeds_ada_norm=10, norm_eps=1e-6
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    if sharing:
        for block in theirs.transformer_blocks:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def outputs(model: DiT, theirs: torch.nn.Module, t: int) -> tuple[Tensor, Tensor]:
    x, times, y = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((3,), t), torch.tensor([0, 9, 10])
    return model(x, times, y), theirs(x, timestep=times, class_labels=y).sample


def test_a_converted_diffusers_dit_answers_as_diffusers_does(tmp_path: Path) -> None:
    theirs = diffusers_dit(tmp_path / "theirs")
    main(["convert", str(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"), "--out", str(tmp_path / "ours.safetensors")])
    model = load_dit(tmp_path / "ours.safetensors")
    assert model.config == DiT(8, 2, 4, 32, 3, 4, num_classes=10).config
    torch.testing.assert_close(*outputs(model, theirs, 0), rtol=1e-4, atol=1e-5)
    # diffusers spaces the time embedding's 128 frequencies over 127 steps, DiT, whose weights these are, over 128; at t = 0 that makes no difference.
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    for t in (1, 500, 999):
        torch.testing.assert_close(*outputs(model, theirs, t), rtol=1e-4, atol=1e-4)


def test_diffusers_blocks_that_learned_embedders_of_their_own_cannot_become_a_dit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    diffusers_dit(tmp_path, sharing=False)
    assert "cannot become one" in says(capsys, "convert", tmp_path / "diffusion_pytorch_model.safetensors", "--out", tmp_path / "x.safetensors")


def test_what_shapes_do_not_tell_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = ("--out", tmp_path / "x.safetensors")
    torch.save(tiny_dit(1).state_dict(), tmp_path / "odd.pt")
    assert "pass --num-heads" in says(capsys, "convert", tmp_path / "odd.pt", *out)
    torch.save(tiny_dit(1, posenc="gta").state_dict(), tmp_path / "gta.pt")
    assert "--posenc rope or --posenc gta" in says(capsys, "convert", tmp_path / "gta.pt", *out)
    assert "--input-size" in says(capsys, "convert", tmp_path / "gta.pt", *out, "--posenc", "gta")
    assert "11 rows" in says(capsys, "convert", tmp_path / "odd.pt", *out, "--num-heads", "4", "--num-classes", "5")
    diffusers_dit(tmp_path / "d")
    (tmp_path / "d" / "config.json").unlink()
    assert "--input-size" in says(capsys, "convert", tmp_path / "d" / "diffusion_pytorch_model.safetensors", *out)
    assert "not divisible by 5" in says(capsys, "convert", tmp_path / "odd.pt", *out, "--num-heads", "5")
    assert "cut into patches of 2" in says(capsys, "convert", tmp_path / "gta.pt", *out, "--posenc", "gta", "--input-size", "7")
    assert "input_size is 8, not 16; leave that out" in says(capsys, "convert", tmp_path / "odd.pt", *out, "--num-heads", "4", "--input-size", "16")
    assert not (tmp_path / "x.safetensors").exists()
    told = [("gta.pt", "--posenc", "gta", "--input-size", "8"), ("odd.pt", "--num-heads", "4")]
    for name, *flags in told:
        main(["convert", str(tmp_path / name), *map(str, out), *flags])
        assert load_dit(tmp_path / "x.safetensors").config["num_heads"] == 4


def test_nothing_is_written_for_a_file_that_is_no_dit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "linear.pt")
    assert "is not a DiT" in says(capsys, "convert", tmp_path / "linear.pt", "--out", tmp_path / "x.safetensors")
    state = bare_dit(tmp_path / "s.pt").state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(state | {"extra": torch.ones(1)}, tmp_path / "part.pt")
    assert "blocks.1.mlp.fc2.bias is missing; extra is unknown" in says(capsys, "convert", tmp_path / "part.pt", "--out", tmp_path / "x.safetensors")
    assert "must end in .safetensors" in says(capsys, "convert", tmp_path / "s.pt", "--out", tmp_path / "x.pt")
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("changes", [{}, {"posenc": "rope"}, {"qk_norm": True}, {"learn_sigma": False}, {"class_dropout_prob": 0.0}, {"mlp_ratio": 2.5}])
def test_shapes_and_configuration_determine_each_other(changes: dict) -> None:
    model = tiny_dit(1, **changes)
    state = model.state_dict()
    assert list(layouts.published_shapes(model.config)) == list(state)
    assert layouts.published_shapes(model.config) == {name: tuple(value.shape) for name, value in state.items()}
    told = {"num_heads": 4, "num_classes": 10, "posenc": model.config["posenc"], "input_size": 8}
    assert layouts.config_from_shapes(state, **told) == model.config


@pytest.mark.parametrize("name", DiT_models)
def test_every_published_size_is_known_by_its_shapes(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    assert layouts.layout_of(model.state_dict()) == "DiT"
    assert layouts.config_from_shapes(model.state_dict()) == model.config
    assert layouts.model_name(model.config) == name


def test_the_published_xl_has_the_published_shapes() -> None:
    published = {name: tuple(shape) for name, shape in json.loads((GOLDEN / "dit_xl2_state_dict.json").read_text()).items()}
    state = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    assert layouts.published_shapes(layouts.config_from_shapes(state)) == published


def test_the_position_embedding_that_diffusers_leaves_out_is_the_published_one() -> None:
    torch.testing.assert_close(layouts.sincos_position_embedding(32, 5), sincos_position_embedding(32, 5))


def test_inspect_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_weights(tmp_path / "ours.safetensors", tiny_dit(1).state_dict(), tiny_dit(1).config)
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "other.pt")
    fast_dit(tmp_path / "0000300.pt")
    gta(tmp_path / "gta.pt")
    repa(tmp_path / "repa.pt")
    main(["inspect", "--json", *(str(tmp_path / name) for name in ("ours.safetensors", "0000300.pt", "gta.pt", "repa.pt", "other.pt"))])
    ours, fast, rotated, aligned, other = json.loads(capsys.readouterr().out)
    assert (ours["layout"], ours["dtype"], ours["config"]) == ("ours", ["float16"], tiny_dit(1).config)
    assert ours["parameters"] == sum(p.numel() for p in tiny_dit(1).parameters()) and ours["tensors"] == len(tiny_dit(1).state_dict())
    assert (fast["layout"], fast["model"], fast["step"], fast["holds"]) == ("DiT", "DiT of depth 2, width 384, 6 heads, patch 8", 300, ["ema", "model", "opt"])
    assert (rotated["layout"], rotated["step"], rotated["config"]["posenc"], rotated["config"]["qk_norm"]) == ("GTA", 7, "gta", True)
    assert (aligned["layout"], aligned["step"]) == ("REPA", 400) and "projectors" in aligned["notes"][0] and "SiT" in aligned["notes"][1]
    assert (other["layout"], other["model"], other["parameters"]) == ("unknown", None, 6)
    main(["inspect", str(tmp_path / "ours.safetensors")])
    assert "hidden_size 32" in capsys.readouterr().out


def test_doctor_finds_the_bundled_models_and_samples_one_step(capsys: pytest.CaptureFixture) -> None:
    main(["doctor", "--json"])
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["torch"]["state"] in ("ok", "differs") and found["emoji dit-large"]["state"] == found["emoji sit-large"]["state"] == "ok"
    assert found["one step"]["state"] == "ok"
    assert [name for name, finding in found.items() if finding["needed"]][:2] == ["torch", "numpy"]
    assert not found["ruff"]["needed"]


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    emoji = presets.PRESETS["emoji"]
    lost = replace(emoji, denoisers=tuple(replace(file, path=presets.ROOT / "nowhere" / file.path.name) for file in emoji.denoisers))
    monkeypatch.setitem(doctor.PRESETS, "emoji", lost)
    monkeypatch.setattr(doctor, "_one_step", lambda: doctor.Finding("one step", "failed", "", needed=True))
    assert "emoji dit-small, emoji dit-base, emoji dit-large, one step are missing or failed" in says(capsys, "doctor")
