"""The sweep of the bundled text-to-image pair: caching leaves nothing behind, rows are kept over a kill, and captions take turns by category."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sd import sweep_emoji
from sd.sweep_emoji import choose_captions, deep_cache, draw
from sd.tstitch_sd_utils import get_tstitch_pipepline
from tstitch.data import write_features
from tstitch.errors import InputError
from tstitch.files import read_json

CATEGORIES = ("smileys & emotion", "food & drink", "flags")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve items of three categories, with captions."""
    folder, labels = tmp_path_factory.mktemp("features"), np.repeat([0, 1, 2], (6, 4, 2))
    write_features(folder, np.zeros((12, 1, 8, 16, 16), np.float32), labels, num_classes=3, vae="none", scaling_factor=1.0)
    rows = [
        {"names": [f"name {k}"], "skin_tone": "", "style": ("google", "twitter")[k % 2], "category": CATEGORIES[label], "emoji": str(k)}
        for k, label in enumerate(labels)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(features: Path, out: Path, *words: str) -> list[str]:
    return ["--features-path", str(features), "--num-images", "3", "--num-sampling-steps", "4", "--out", str(out), "--device", "cpu", *words]


def test_categories_take_turns_and_a_caption_depends_on_its_seed_alone(features: Path, tmp_path: Path) -> None:
    args = sweep_emoji.parse_args(arguments(features, tmp_path / "x.json"))
    args.num_images = 7
    captions = choose_captions(args)
    assert [caption["label"] for caption in captions] == [0, 1, 2, 0, 1, 2, 0]
    args.seed, args.num_images = 2, 3
    assert choose_captions(args) == captions[2:5]


def test_a_cache_changes_pictures_inside_its_block_alone_and_is_empty_at_every_call(features: Path) -> None:
    pytest.importorskip("DeepCache")
    pipe = get_tstitch_pipepline("emoji", device=torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    captions = [{"names": ["red heart"], "skin_tone": "", "style": "google"}, {"names": ["dog"], "skin_tone": "", "style": "twitter"}]
    args = argparse.Namespace(seed=0, num_sampling_steps=6, cfg_scale=3.0)

    def pictures(ratio: float, interval: int, count: int = 2) -> torch.Tensor:
        return draw(pipe, args, captions, 0, count, ratio, interval)

    plain, cached = pictures(0.5, 1), pictures(0.5, 3)
    assert not torch.equal(plain, cached)
    pictures(0.0, 3, count=1)  # another start of the large model, and another size of the batch
    assert torch.equal(pictures(0.5, 3), cached)
    assert torch.equal(pictures(0.5, 1), plain)
    assert torch.equal(pictures(1.0, 3), pictures(1.0, 1))  # the small model is not cached
    with pytest.raises(ZeroDivisionError), deep_cache(pipe, 3):
        raise ZeroDivisionError
    assert torch.equal(pictures(0.5, 1), plain)


def test_a_sweep_that_was_cut_off_keeps_its_rows(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sweep.json"
    words = arguments(features, out, "--ratios", "0", "0.5")
    measure, measured = sweep_emoji.measure_row, []

    def counted(pipe: object, args: object, captions: object, extractor: object, ratio: float, interval: int, bar: object) -> dict:
        measured.append((ratio, interval))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(pipe, args, captions, extractor, ratio, interval, bar)

    monkeypatch.setattr(sweep_emoji, "measure_row", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep_emoji.main(words)
    first = read_json(out)["rows"]
    sweep_emoji.main(words)
    assert measured == [(0, 1), (0.5, 1), (0.5, 1)]
    rows = read_json(out)["rows"]
    assert [row["name"] for row in rows] == ["L:100", "S:50 L:50"]
    assert rows[0]["fd_emoji"] == first[0]["fd_emoji"]
    assert rows[0]["sampling_speed_up"] == 1
    assert rows[0]["fd_relative"] == 0
    assert all(0 <= row[key] <= 1 for row in rows for key in ("category_right", "style_right"))

    sweep_emoji.main(arguments(features, out, "--ratios", "0"))  # fewer rows are asked for: the others stay
    assert [row["name"] for row in read_json(out)["rows"]] == ["L:100", "S:50 L:50"]
    with pytest.raises(InputError, match=r"other settings \(captions, seed\)"):
        sweep_emoji.main([*words, "--seed", "1"])


def test_bad_input_is_refused_in_a_sentence_before_any_picture(features: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--ratios", "0.5"], "begin with 0"),
        (["--ratios", "0", "1.5"], "stay in 0..1"),
        (["--num-images", "1"], "at least 2 images"),
        (["--seed", "-1"], "must not be negative"),
        (["--cache-intervals", "3", "1"], "begin with 1"),
        (["--cfg-scale", "nan"], "finite"),
        (["--num-sampling-steps", "2000"], "--steps 2000"),
        (["--features-path", str(tmp_path / "none")], "none"),
    ):
        with pytest.raises(InputError, match=message):
            sweep_emoji.main([*arguments(features, tmp_path / "x.json"), *words])
    assert not (tmp_path / "x.json").exists()
