"""Pictures with captions for SDXL: which lines are refused, what a bucket keeps of a picture, and that what is cached is what the models make."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sd_tiny import tiny_sdxl, write_lines, write_pictures

from sd import sdxl_data
from sd.sdxl_data import EncodedPictures, Placement, draw_bucket_batch, make_buckets, nearest_bucket, read_metadata
from tstitch.errors import InputError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


# Metadata, shapes, batches.


def test_every_line_that_cannot_be_used_is_reported_with_its_number(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    good = '{"file_name": "0.png", "text": "fine"}'
    bad = [good, "", "{", '["0.png"]', '{"file_name": "0.png"}', '{"file_name": "none.png", "text": "x"}', good, '{"file_name": "damaged.png", "text": "x"}']
    with pytest.raises(InputError) as refused:
        read_metadata(write_lines(tmp_path, bad), tmp_path)
    said = str(refused.value)
    assert "metadata.jsonl" in said
    for part in ("line 3: not JSON", "line 4: not a JSON object", "line 5: no text", "line 6: no picture", "line 8: "):
        assert part in said
    assert "line 1" not in said and "line 2" not in said and "line 7" not in said
    with pytest.raises(InputError, match="line 5: not JSON.*; and 2 more"):
        read_metadata(write_lines(tmp_path, ["{"] * 7), tmp_path)
    with pytest.raises(InputError, match="line 2: text is no string"):
        read_metadata(write_lines(tmp_path, [good, '{"file_name": "0.png", "text": 3}']), tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(good.encode() + b'\n{"file_name": "0.png", "text": "\xff"}')
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        read_metadata(tmp_path / "metadata.jsonl", tmp_path)
    with pytest.raises(InputError, match="names no pictures"):
        read_metadata(write_lines(tmp_path, ["", " "]), tmp_path)
    with pytest.raises(InputError, match="metadata_file"):
        read_metadata(tmp_path / "none.jsonl", tmp_path)
    lines = read_metadata(write_lines(tmp_path, [good, "", good]), tmp_path)
    assert [(picture.line, picture.text, picture.size) for picture in lines] == [(1, "fine", (40, 40)), (3, "fine", (40, 40))]


def test_a_picture_that_lies_on_its_side_is_read_as_it_is_looked_at(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (20, 10))
    picture.paste((255, 255, 255), (0, 0, 20, 1))  # the first row, which a viewer shows as the right column
    picture.save(tmp_path / "0.webp", exif=exif, lossless=True)
    (read,) = read_metadata(write_lines(tmp_path, ['{"file_name": "0.webp", "text": ""}']), tmp_path)
    assert read.size == (20, 10)
    data = EncodedPictures([read], tiny_sdxl(), tmp_path, [(20, 10)])
    pixels = data._pixels(0)
    assert pixels.shape == (3, 20, 10) and (pixels[:, :, -1] == 255).all() and (pixels[:, :, :-1] == 0).all()


def test_at_1024_the_shapes_are_those_that_sdxl_was_trained_on() -> None:
    """Podell et al. 2023, arXiv:2307.01952, appendix I."""
    sides = {
        512: range(1856, 2049, 64), 576: range(1664, 1793, 64), 640: range(1536, 1601, 64), 704: range(1344, 1473, 64), 768: (1280, 1344), 832: (1152, 1216),
        896: (1088, 1152), 960: (1024, 1088),
    }  # fmt: skip
    tall = [(width, height) for width, heights in sides.items() for height in heights]
    assert sorted(make_buckets(1024)) == sorted([*tall, (1024, 1024), *((b, a) for a, b in tall)])
    assert make_buckets(512, 512) == [(512, 512)]
    with pytest.raises(InputError, match="--bucket_step"):
        make_buckets(32)


@pytest.mark.parametrize("size", [(40, 40), (33, 64), (70, 20), (1000, 10), (7, 5)])
def test_a_picture_covers_its_bucket_and_loses_as_little_as_it_must(size: tuple[int, int]) -> None:
    buckets = make_buckets(32, 8)
    bucket = nearest_bucket(size, buckets)
    ratio = math.log(size[1] / size[0])
    assert all(abs(math.log(bucket[1] / bucket[0]) - ratio) <= abs(math.log(w / h) - ratio) + 1e-9 for h, w in buckets)
    placed = Placement.of(size, bucket)
    assert placed.scaled[0] >= bucket[0] and placed.scaled[1] >= bucket[1] and (placed.scaled[0] == bucket[0] or placed.scaled[1] == bucket[1])
    assert abs(2 * placed.top + bucket[0] - placed.scaled[0]) <= 1 and abs(2 * placed.left + bucket[1] - placed.scaled[1]) <= 1


def test_the_crop_is_where_the_conditions_say() -> None:
    rows_and_columns = np.stack(np.meshgrid(np.arange(40), np.arange(32), indexing="ij"), axis=-1).astype(np.uint8)
    picture = Image.fromarray(np.concatenate([rows_and_columns, np.zeros((40, 32, 1), np.uint8)], axis=-1))
    placed = Placement.of((40, 32), (32, 32))
    cut = placed.cut(picture)
    assert (placed.top, placed.left) == (4, 0)
    assert cut[:2, 0, 0].tolist() == [placed.top, placed.left] and cut[:2, -1, -1].tolist() == [placed.top + 31, placed.left + 31]


def test_a_batch_has_one_shape_and_every_picture_comes_equally_often() -> None:
    bucket_of = torch.tensor([0, 1, 1, 3, 0, 1, 1, 1, 0, 1])  # one picture has a shape of its own
    for start in (0, 20):
        batches = [draw_bucket_batch(bucket_of, step=step, part=part, num_parts=2, size=3, seed=7) for step in range(start, start + 5) for part in (0, 1)]
        assert all(len(bucket_of[batch].unique()) == 1 for batch in batches)
        assert torch.cat(batches).bincount(minlength=10).tolist() == [3] * 10
    ones = [draw_bucket_batch(torch.zeros(6, dtype=torch.long), step=step, part=0, num_parts=1, size=2, seed=seed) for seed in (0, 1) for step in range(3)]
    assert sorted(torch.cat(ones[:3]).tolist()) == [0, 1, 2, 3, 4, 5]  # once before any comes again
    assert torch.cat(ones[:3]).tolist() != torch.cat(ones[3:]).tolist()
    cycles = [
        torch.cat([draw_bucket_batch(torch.zeros(6, dtype=torch.long), step=6 * k + step, part=0, num_parts=1, size=2, seed=0) for step in range(6)])
        for k in (0, 1)
    ]
    assert cycles[0].tolist() != cycles[1].tolist()  # and in an order of its own every time


# Encoding.


@pytest.mark.parametrize("zeros", [True, False])
def test_what_is_cached_is_what_the_pipeline_makes_itself(pictures: Path, tmp_path: Path, zeros: bool) -> None:
    pipe = tiny_sdxl(force_zeros_for_empty_prompt=zeros)
    data = EncodedPictures(read_metadata(pictures / "metadata.jsonl", pictures), pipe, tmp_path, make_buckets(32, 8))
    data.encode(pipe, ["another"])
    items = torch.tensor([1, 7])
    batch = data.batch(items, torch.tensor([False, True]))
    embeds, null, pooled, null_pooled = pipe.encode_prompt("colour 1")
    for ours, theirs in ((batch.text.embeds, torch.cat([embeds, null])), (batch.text.pooled, torch.cat([pooled, null_pooled]))):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert (batch.text.embeds[1].abs().max() == 0) == zeros
    torch.testing.assert_close(data.text(["another"]).embeds, pipe.encode_prompt("another")[0], rtol=2e-3, atol=2e-3)
    assert batch.time_ids[0].tolist() == [33, 64, *data.placements[1][1:3], *data.placements[1].bucket] and data.placements[1].bucket == (24, 40)
    posterior = pipe.vae.encode(data._pixels(1)[None] / 127.5 - 1).latent_dist
    draws = torch.stack([data.batch(items[:1], torch.tensor([False])).latents[0] for _ in range(200)]) / pipe.vae.config.scaling_factor
    assert draws.shape[1:] == (4, 6, 10)
    torch.testing.assert_close(draws.mean(0), posterior.mean[0], rtol=0, atol=5 * posterior.std.max().item() / math.sqrt(200))
    torch.testing.assert_close(draws.std(0).mean(), posterior.std.mean(), rtol=0.05, atol=0)


def test_encoding_goes_on_where_it_was_and_redoes_only_what_changed(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl_data, "ENCODED_TOGETHER", 4)
    pipe, read = tiny_sdxl(), read_metadata(pictures / "metadata.jsonl", pictures)
    told = []
    monkeypatch.setattr(pipe, "encode_prompt", lambda captions, _own=pipe.encode_prompt, **words: told.append(captions) or _own(captions, **words))

    def encode(lines: list, process: int = 0, num_processes: int = 1) -> dict[Path, bytes]:
        told.clear()
        EncodedPictures(lines, pipe, tmp_path, make_buckets(32, 8)).encode(pipe, process=process, num_processes=num_processes)
        return {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}

    encode(read, 0, 2)
    whole = encode(read, 1, 2)
    assert len(whole) == 12 + 5 + 1 and len(told) == 1
    for path in list(whole)[::5]:
        path.unlink()
    assert encode(read) == whole
    assert encode(read) == whole and not told
    changed = [*read[:-1], sdxl_data.CaptionedPicture(12, read[-1].file_name, read[-1].path, "new", read[-1].size)]
    assert set(encode(changed)) > set(whole) and told == [["colour 3", "colour 4", "new"]]  # what shared a call, and shares it again
    other = tiny_sdxl(seed=5)
    assert not set(EncodedPictures(read, other, tmp_path, make_buckets(32, 8))._latents) & set(whole)


def test_a_picture_that_cannot_be_decoded_is_named_with_its_line(pictures: Path, tmp_path: Path) -> None:
    whole = (pictures / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    pipe = tiny_sdxl()
    data = EncodedPictures(read_metadata(write_lines(tmp_path, ["", '{"file_name": "0.png", "text": ""}']), tmp_path), pipe, tmp_path, make_buckets(32, 8))
    with pytest.raises(InputError, match="line 2: .*0.png cannot be decoded"):
        data.encode(pipe)


def test_a_run_goes_on_only_with_the_same_pictures(pictures: Path, tmp_path: Path) -> None:
    for path in pictures.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def index() -> dict:
        return EncodedPictures(read_metadata(tmp_path / "metadata.jsonl", tmp_path), tiny_sdxl(), tmp_path, make_buckets(32, 8)).index

    before = index()
    assert index() == before
    with Image.open(tmp_path / "0.png") as picture:
        changed = picture.point(lambda value: 255 - value)
    changed.save(tmp_path / "0.png")
    assert index() != before
