"""The emoji text-to-image pair: captions belong to their drawings, words are read offline, and the two U-Nets share one text encoder."""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import kill_after, weights_of

from assets.emoji import build_dataset, write_captions
from sd import train_text_to_image as train
from sd.emoji_text import (
    CLIPTokenizer,
    build_text_encoder,
    build_tokenizer,
    draw_text,
    draw_texts,
    emoji_numbers,
    load_text,
    read_captions,
    save_text,
    token_ids,
    vocabulary_texts,
)
from tstitch.autoencoder import Autoencoder
from tstitch.data import write_features
from tstitch.errors import InputError
from tstitch.presets import ROOT
from tstitch.training import checkpoint_files

NAMES = ["red heart", "dog face", "waving hand", "pizza"]
COUNT = 24


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents that are constant for each of four names, with captions."""
    folder = tmp_path_factory.mktemp("features")
    labels = np.arange(COUNT) % 4
    mean = np.broadcast_to((labels - 1.5)[:, None, None, None], (COUNT, 4, 16, 16))
    write_features(folder, np.concatenate([mean, np.full_like(mean, -8.0)], axis=1)[:, None], labels, num_classes=4, vae="none", scaling_factor=1.0)
    rows = [
        {"names": [NAMES[k], f"older {NAMES[k]}"], "skin_tone": "dark skin tone" if k == 2 else "", "style": "google", "category": "objects", "emoji": str(k)}
        for k in labels.tolist()
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(features: Path, folder: Path, steps: int, *more: str) -> list[str]:
    return [
        "--features-path", str(features), "--model", "emoji-small", "--max-steps", str(steps), "--global-batch-size", "8", "--lr", "1e-3",
        "--results-dir", str(folder), "--ckpt-every", "2", "--log-every", "2", "--ema-decay", "0.9", "--autoresume", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pair(features: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folder and pipeline of a large U-Net with its text encoder, and of a small one on that encoder."""
    runs = tmp_path_factory.mktemp("runs")
    folder = runs / "sd"
    train.main(arguments(features, runs / "large", 3, "--model", "emoji-large", "--pipeline", str(folder)))
    train.main(arguments(features, runs / "small", 3, "--text-encoder", str(folder), "--pipeline", str(runs / "again")))
    train.main(arguments(features, runs / "small", 3, "--text-encoder", str(folder), "--pipeline", str(folder)))
    return runs, folder


def load_pipeline(folder: Path, unet: str = "unet") -> train.StableDiffusionPipeline:
    vae = Autoencoder(ROOT / "pretrained_models" / "emoji" / "vae").vae
    model = train.UNet2DConditionModel.from_pretrained(folder / unet)
    pipeline = train.StableDiffusionPipeline.from_pretrained(folder, unet=model, vae=vae, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def npm_package(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def packages(tmp_path: Path) -> list[str]:
    """Arguments for three npm packages of five emoji, one with a skin tone; a drawing that Twitter lacks."""
    entry = {"category": "Smileys & Emotion", "short_names": ["heart"], "short_name": "heart"}
    emoji = [
        {**entry, "unified": "2764-FE0F", "name": "HEAVY BLACK HEART", "image": "2764.png"},
        {**entry, "unified": "1F44B", "name": "WAVING HAND SIGN", "image": "1f44b.png", "short_names": ["wave"], "category": "People & Body",
         "skin_variations": {"1F3FD": {"image": "1f44b-1f3fd.png"}}},
        {**entry, "unified": "1F3FB", "name": "SWATCH", "image": "1f3fb.png", "category": "Component"},
        *({**entry, "unified": f"1F43{k}", "name": None, "short_name": f"beast-{k}", "short_names": [f"beast-{k}"], "image": f"{k}.png"} for k in range(3)),
    ]  # fmt: skip
    drawing = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(drawing, "PNG")
    images = ["2764.png", "1f44b.png", "1f44b-1f3fd.png", "1f3fb.png", "0.png", "1.png", "2.png"]
    for style, lacking in (("google", None), ("twitter", "0.png")):
        files = {f"img/{style}/64/{image}": drawing.getvalue() for image in images if image != lacking}
        npm_package(tmp_path / f"{style}.tgz", {"emoji.json": json.dumps(emoji).encode(), **files})
    names = {"\u2764\ufe0f": {"name": "red heart"}, "\U0001f44b": {"name": "waving hand"}}
    npm_package(tmp_path / "names.tgz", {"data-by-emoji.json": json.dumps(names).encode()})
    return ["--tarballs", f"google={tmp_path / 'google.tgz'}", f"twitter={tmp_path / 'twitter.tgz'}"]


def test_each_training_drawing_has_the_caption_of_its_own_name_and_style(packages: list[str], tmp_path: Path) -> None:
    build_dataset.main(["--out", str(tmp_path / "emoji.npz"), *packages])
    options = ["--data", str(tmp_path / "emoji.npz"), "--out", str(tmp_path / "captions.jsonl"), "--names", str(tmp_path / "names.tgz")]
    write_captions.main([*options, *packages])
    with np.load(tmp_path / "emoji.npz") as drawings:
        shown = ~drawings["held_out"]
        names, styles = drawings["name"][shown].tolist(), [build_dataset.DRAWING_SETS[k] for k in drawings["drawing_set"][shown]]
    captions = read_captions(tmp_path / "captions.jsonl", len(names))
    assert all(name in caption["names"] or name.replace("-", " ") in caption["names"] for name, caption in zip(names, captions, strict=True))
    assert styles == [caption["style"] for caption in captions]
    texts = [caption["text"] for caption in captions]
    assert "red heart, google style" in texts and "waving hand, medium skin tone, twitter style" in texts
    with pytest.raises(InputError, match="build_dataset"):  # the drawings of a sample are no longer those of the packages
        build_dataset.main(["--out", str(tmp_path / "emoji.npz"), "--sample", "4", *packages])
        write_captions.main([*options, *packages])


def test_names_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    for content in (b"{", b"[]", b'{"x": {}}'):
        with pytest.raises(InputError, match="no readable package unicode-emoji-json"):
            write_captions.read_names(npm_package(tmp_path / "names.tgz", {"data-by-emoji.json": content}))


def test_bad_captions_are_refused_by_line(features: Path, tmp_path: Path) -> None:
    lines = (features / "captions.jsonl").read_text().splitlines()
    file = tmp_path / "captions.jsonl"
    for path in (file, tmp_path):
        with pytest.raises(InputError, match="write_captions"):
            read_captions(path, COUNT)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_captions(file, COUNT)
    file.write_text("\n".join([lines[0], '{"names": []}', *lines[2:]]))
    with pytest.raises(InputError, match="line 2"):
        read_captions(file, COUNT)
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match=f"{COUNT - 1} captions"):
        read_captions(file, COUNT)


def test_a_caption_is_said_in_many_ways_and_a_tenth_of_them_is_empty(features: Path) -> None:
    caption = read_captions(features / "captions.jsonl", COUNT)[2]
    draw = random.Random(0)
    texts = [draw_text(caption, draw) for _ in range(2000)]
    assert 0.08 < texts.count("") / 2000 < 0.12
    expected = {
        "waving hand",
        "waving hand, google style",
        "waving hand, dark skin tone, google style",
        "older waving hand",
        "objects",
        "objects, google style",
    }
    assert expected <= set(texts) and "hand" in texts
    words = {word for text in texts for word in text.split()}
    assert words == {word for name in caption["names"] for word in f"{name} {name},".split()} | {
        "dark",
        "skin",
        "tone",
        "tone,",
        "google",
        "style",
        "objects",
        "objects,",
    }
    torch.manual_seed(3)
    first = draw_texts([caption] * 8)
    torch.manual_seed(3)
    assert draw_texts([caption] * 8) == first


def test_one_emoji_has_one_number_in_all_its_drawings(features: Path) -> None:
    assert emoji_numbers(read_captions(features / "captions.jsonl", COUNT)).tolist() == [k % 4 for k in range(COUNT)]


def test_the_tokenizer_reads_offline_what_it_wrote(features: Path, tmp_path: Path) -> None:
    texts = vocabulary_texts(read_captions(features / "captions.jsonl", COUNT))
    tokenizer = build_tokenizer(texts)
    written = build_text_encoder(tokenizer)
    save_text(tmp_path, tokenizer, written)
    assert written.dtype == torch.float32, "the caller's stays as it is"
    read, encoder = load_text(tmp_path)
    unknown = ["", "zebra Crossing 42!", "\u6f22\u5b57 \U0001f600", "word " * 100]
    assert torch.equal(token_ids(read, [*texts, *unknown]), token_ids(tokenizer, [*texts, *unknown]))
    assert read.decode(read("Red  HEART").input_ids, skip_special_tokens=True) == "red heart"
    assert isinstance(read, CLIPTokenizer) and read("red heart").input_ids[1:-1] == read.convert_tokens_to_ids(["red</w>", "heart</w>"])
    assert encoder(token_ids(read, unknown)).last_hidden_state.isfinite().all()
    assert "/" not in (tmp_path / "tokenizer" / "tokenizer_config.json").read_text()
    with pytest.raises(InputError, match="tokenizer.json"):
        load_text(tmp_path / "nowhere")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged"):
        load_text(tmp_path)


def test_the_loss_falls(features: Path, tmp_path: Path) -> None:
    train.main(arguments(features, tmp_path, 30))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_killed_run_resumes_to_the_same_weights(features: Path, tmp_path: Path) -> None:
    more = ("--class-balance", "0.5", "--lr-schedule", "cosine", "--clip-norm", "1")
    train.main(arguments(features, tmp_path / "whole", 16, *more))
    folder = tmp_path / "killed" / "checkpoints"
    kill_after(
        [sys.executable, train.__file__, *arguments(features, tmp_path / "killed", 16, *more)], lambda: folder.is_dir() and len(checkpoint_files(folder)) > 1
    )
    assert int(checkpoint_files(folder)[-1].stem) < 16
    train.main(arguments(features, tmp_path / "killed", 16, *more))
    whole, killed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert any("text_encoder" in name for name in whole)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_the_second_run_leaves_the_text_encoder_as_it_is(pair: tuple[Path, Path]) -> None:
    runs, folder = pair
    assert not any("text_encoder" in name for name in weights_of(runs / "small"))
    for part in ("tokenizer", "text_encoder"):
        for file in (folder / part).iterdir():
            assert file.read_bytes() == (runs / "again" / part / file.name).read_bytes()


def test_the_first_run_trains_the_text_encoder_and_ships_its_average(pair: tuple[Path, Path], features: Path) -> None:
    runs, folder = pair
    _, shipped = load_text(folder)
    average = {name.removeprefix("ema.text_encoder."): value for name, value in weights_of(runs / "large").items() if name.startswith("ema.text_encoder.")}
    state = shipped.state_dict()
    assert average.keys() == state.keys()
    assert all(torch.equal(state[name], value.half().float()) for name, value in average.items())
    torch.manual_seed(0)
    untrained = build_text_encoder(build_tokenizer(vocabulary_texts(read_captions(features / "captions.jsonl", COUNT)))).state_dict()
    assert all(not torch.equal(untrained[name].half().float(), value) for name, value in state.items() if name.endswith(".weight"))


def test_a_u_net_is_not_written_beside_one_that_reads_another_text_encoder(pair: tuple[Path, Path], features: Path, tmp_path: Path) -> None:
    runs, folder = pair
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds unet_small, whose text encoder would be replaced"):
        train.main(arguments(features, tmp_path / "large", 1, "--model", "emoji-large", "--pipeline", str(folder)))
    with pytest.raises(InputError, match="holds unet, whose text encoder would be replaced"):
        train.main(arguments(features, tmp_path / "small", 1, "--pipeline", str(folder)))
    assert {path: path.read_bytes() for path in before} == before


def test_the_index_names_the_large_u_net_only_where_it_is(pair: tuple[Path, Path]) -> None:
    runs, folder = pair
    assert "unet" in json.loads((folder / "model_index.json").read_text())
    assert "unet" not in json.loads((runs / "again" / "model_index.json").read_text())


@pytest.mark.parametrize("unet", ["unet", "unet_small"])
def test_the_exported_folder_is_a_pipeline_in_which_the_prompt_acts(pair: tuple[Path, Path], unet: str) -> None:
    pipeline = load_pipeline(pair[1], unet)

    def sample(prompt: str) -> torch.Tensor:
        return pipeline(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    heart, dog = sample("red heart"), sample("dog face, twitter style")
    assert heart.shape == (1, 3, 64, 64) and heart.dtype == torch.float32
    assert torch.equal(heart, sample("red heart")) and (heart - dog).abs().max() > 1e-4


def test_the_pair_is_as_small_as_it_ships(pair: tuple[Path, Path]) -> None:
    size = {part: sum(file.stat().st_size for file in (pair[1] / part).iterdir()) for part in ("tokenizer", "text_encoder", "unet", "unet_small")}
    assert size["tokenizer"] + size["text_encoder"] < 600_000 and size["unet"] < 2_600_000 and size["unet_small"] < 700_000


def test_previews_are_drawn_and_change_nothing_else(features: Path, tmp_path: Path) -> None:
    vae = str(ROOT / "pretrained_models" / "emoji" / "vae")
    train.main(arguments(features, tmp_path / "plain", 2))
    train.main(arguments(features, tmp_path / "seen", 2, "--preview-every", "1", "--vae", vae))
    assert [file.name for file in sorted((tmp_path / "seen" / "previews").iterdir())] == ["0000001.png", "0000002.png"]
    plain, seen = weights_of(tmp_path / "plain"), weights_of(tmp_path / "seen")
    assert all(torch.equal(plain[name], seen[name]) for name in plain)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--text-dropout", "1"], "--text-dropout"),
        (["--snr-gamma", "0"], "--snr-gamma"),
        (["--data-path", "pictures"], "--features-path"),
        (["--text-encoder", "nowhere"], "tokenizer.json"),
        (["--captions", "nowhere.jsonl"], "write_captions"),
        (["--preview-every", "-1"], "--preview-every"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_in_a_sentence(features: Path, tmp_path: Path, more: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        train.main(arguments(features, tmp_path / "run", 1, *more))
    assert not (tmp_path / "run").exists()
