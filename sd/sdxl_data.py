"""Pictures with captions for SDXL: read from a metadata file, sorted into shapes, encoded once, drawn in batches of one shape.

A metadata file is jsonl, one picture a line: {"file_name": "hearts/red.png", "text": "a red heart"}, the file names relative to the folder of pictures.
What the frozen models make of a picture or a caption is a file of its own in the cache, named by a hash of all that it depends on. So a killed encoding goes
on where it was, what changed is encoded again, and several runs may share one cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tstitch.checkpoints import first_line
from tstitch.data import draw_latents
from tstitch.errors import InputError
from tstitch.files import atomic_path
from tstitch.pictures import to_rgb
from tstitch.training import draw_batch

T = TypeVar("T")
Size = tuple[int, int]  # height, width in pixels, the order of SDXL's conditions

ENCODED_TOGETHER = 16
_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # the tag, and its values for pictures that lie on their side
_SHOWN_LINES = 5


@dataclass(frozen=True)
class CaptionedPicture:
    """A line of a metadata file: its number from 1, the picture's name there, its file and its size as it is looked at, the caption."""

    line: int
    file_name: str
    path: Path
    text: str
    size: Size


def read_metadata(file: Path, folder: Path) -> list[CaptionedPicture]:
    """Read which pictures of `folder` have which captions; lines of white space are passed over.

    Raises:
        InputError: if the file is missing or empty, or has lines that cannot be used: their numbers and what is wrong with them.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); pass --metadata_file, one JSON object with file_name and text a line") from None
    pictures, wrong = [], []
    for number, line in enumerate(tqdm(lines, desc="reading metadata", unit="line", disable=len(lines) < 10_000), start=1):
        if not line.strip():
            continue
        try:
            pictures.append(_read_line(number, line, folder))
        except InputError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN_LINES} more" if len(wrong) > _SHOWN_LINES else ""
        raise InputError(f"{file} has lines that cannot be used, mend or remove them: {'; '.join(wrong[:_SHOWN_LINES])}{more}")
    if not pictures:
        raise InputError(f"{file} names no pictures; it needs one JSON object with file_name and text a line")
    return pictures


def _read_line(number: int, line: bytes, folder: Path) -> CaptionedPicture:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeDecodeError:
        raise InputError("not UTF-8") from None
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    for key in ("file_name", "text"):
        if not isinstance(row.get(key), str):
            raise InputError(f"{key} is no string" if key in row else f"no {key}")
    path = folder / row["file_name"]
    if not path.is_file():
        raise InputError(f"no picture {path}")
    try:
        with Image.open(path) as picture:
            turned = _has_exif(picture) and picture.getexif().get(_EXIF_ORIENTATION) in _TURNED
            size = picture.size if turned else picture.size[::-1]
    except Exception as error:  # decoders raise errors of every kind on damaged files
        raise InputError(f"{path} is no picture that can be read ({first_line(error)})") from None
    return CaptionedPicture(number, row["file_name"], path, row["text"], size)


def _has_exif(picture: Image.Image) -> bool:
    """Whether a picture is turned as its EXIF says; of a PNG that would be known only after decoding it."""
    return picture.format != "PNG"


def make_buckets(resolution: int, step: int = 64) -> list[Size]:
    """Shapes that pictures are cropped to: sides are multiples of `step` in [resolution / 2, 2 resolution], 90 to 100 % of resolution**2 pixels.

    At 1024 and 64 these are the shapes that SDXL was trained on (Podell et al. 2023, arXiv:2307.01952, appendix I).

    Raises:
        InputError: if no shape is left.
    """
    sides = range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step)
    buckets = [(height, width) for height in sides for width in sides if 0.9 * resolution**2 <= height * width <= resolution**2]
    if not buckets:
        raise InputError(f"no shapes of about {resolution}x{resolution} pixels have sides that {step} divides; pass another --resolution or --bucket_step")
    return buckets


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is the nearest, by the factor between the two; the larger of two alike."""
    return min(buckets, key=lambda b: (round(abs(math.log(b[1] / b[0]) - math.log(size[1] / size[0])), 9), -b[0] * b[1]))


class Placement(NamedTuple):
    """How a picture fills its bucket: scaled to cover it, its middle cut out."""

    scaled: Size
    top: int
    left: int
    bucket: Size

    @classmethod
    def of(cls, size: Size, bucket: Size) -> Placement:
        """Place a picture of `size`."""
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        scaled = max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))
        return cls(scaled, (scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2, bucket)

    def cut(self, picture: Image.Image) -> Tensor:
        """Pixels of the bucket, uint8 (3, height, width)."""
        (height, width), (bucket_height, bucket_width) = self.scaled, self.bucket
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        cut = picture.crop((self.left, self.top, self.left + bucket_width, self.top + bucket_height))
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()


def draw_bucket_batch(bucket_of: Tensor, *, step: int, part: int, num_parts: int, size: int, seed: int) -> Tensor:
    """Items (size,), all of one bucket, that part `part` of step `step` sees.

    Among N batches in a row, from a multiple of N on, every one of the N items comes exactly `size` times: a bucket has as many batches as items, in random
    order among those of the others, and goes through its own items once before any comes again.

    Args:
        bucket_of: (N,) int64, number of each item's bucket.
        num_parts: parts of a step; see `tstitch.training`.
    """
    count = len(bucket_of)
    cycle, place = divmod(step * num_parts + part, count)
    buckets = bucket_of[draw_batch(None, count, step=cycle, part=0, num_parts=1, size=count, seed=seed)]  # of each batch in this cycle
    items = (bucket_of == buckets[place]).nonzero().flatten()
    earlier = cycle * len(items) + int((buckets[:place] == buckets[place]).sum())
    return items[draw_batch(None, len(items), step=earlier, part=0, num_parts=1, size=size, seed=seed)]


class Text(NamedTuple):
    """What the two text encoders say of captions: embeds (n, tokens, width), pooled (n, width of the second)."""

    embeds: Tensor
    pooled: Tensor


class Batch(NamedTuple):
    """Scaled latents (n, C, h, w), text, and SDXL's six numbers (n, 6): original height and width, top and left of the crop, height and width."""

    latents: Tensor
    text: Text
    time_ids: Tensor


def weights_hash(*modules: nn.Module) -> str:
    """A hash of all the parameters and buffers of modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class EncodedPictures:
    """Captioned pictures as the frozen parts of an SDXL pipeline encode them; `encode` makes what the cache lacks, `batch` reads it.

    Args:
        pipe: its VAE, tokenizers and text encoders are used; on the CPU until `encode`, so that their hash costs no transfer.
        cache: folder, on a disk that all processes share.
        buckets: shapes, from `make_buckets`.

    Attributes:
        bucket_of: (N,) int64, number of each picture's bucket.
        index: what the encoded data depend on, as JSON.
    """

    def __init__(self, pictures: Sequence[CaptionedPicture], pipe: StableDiffusionXLPipeline, cache: Path, buckets: Sequence[Size]) -> None:
        self.pictures, self.cache = pictures, cache
        self.scaling_factor: float = pipe.vae.config.scaling_factor
        self.zero_null = bool(pipe.config.force_zeros_for_empty_prompt)
        self.placements = [Placement.of(picture.size, nearest_bucket(picture.size, buckets)) for picture in pictures]
        numbers = {bucket: k for k, bucket in enumerate(buckets)}
        self.bucket_of = torch.tensor([numbers[placement.bucket] for placement in self.placements])
        self._text_models, self._vae = weights_hash(pipe.text_encoder, pipe.text_encoder_2), weights_hash(pipe.vae)
        self._latents = [self._latents_file(k) for k in range(len(pictures))]
        about = [(picture.text, file.name) for picture, file in zip(pictures, self._latents, strict=True)]
        self.index = {"count": len(pictures), "pictures": _hash(about)[:16], "text_encoders": self._text_models, "vae": self._vae}

    def __len__(self) -> int:
        return len(self.pictures)

    def _latents_file(self, k: int) -> Path:
        # Size and time in place of the contents, which would have to be read at every start.
        about = self.pictures[k].path.stat()
        name = _hash(self._vae, self.pictures[k].file_name, about.st_size, about.st_mtime_ns, self.placements[k])
        return self.cache / "latents" / f"{name}.safetensors"

    def _text_file(self, caption: str) -> Path:
        return self.cache / "text" / f"{_hash(self._text_models, caption)}.safetensors"

    @torch.no_grad()
    def encode(self, pipe: StableDiffusionXLPipeline, more_captions: Sequence[str] = (), process: int = 0, num_processes: int = 1) -> None:
        """Encode this process's share of what the cache lacks; the empty caption and `more_captions` are encoded too.

        Raises:
            InputError: if a picture cannot be decoded, or the models give numbers that are not finite.
        """
        captions = sorted({picture.text for picture in self.pictures} | {"", *more_captions})
        for chunk in self._lacking(captions, self._text_file, "encoding captions", process, num_processes):
            embeds, _, pooled, _ = pipe.encode_prompt(list(chunk), do_classifier_free_guidance=False)
            for caption, *tensors in zip(chunk, embeds, pooled, strict=True):
                _save(self._text_file(caption), dict(zip(Text._fields, tensors, strict=True)))
        unique = list({file: k for k, file in enumerate(self._latents)}.values())
        with ThreadPoolExecutor() as threads:
            for chunk in self._lacking(unique, self._latents.__getitem__, "encoding pictures", process, num_processes):
                for k, pixels in zip(chunk, threads.map(self._pixels, chunk), strict=True):
                    posterior = pipe.vae.encode((pixels[None].to(pipe.vae.device) / 127.5 - 1).to(pipe.vae.dtype)).latent_dist
                    _save(self._latents[k], {"moments": torch.cat([posterior.mean, posterior.logvar], dim=1)[0]})

    @staticmethod
    def _lacking(items: Sequence[T], file_of: Callable[[T], Path], desc: str, process: int, num_processes: int) -> Iterator[Sequence[T]]:
        """Chunks of this process that are not all there, cut as in a run that was never killed: what shares a call may move the last bit."""
        chunks = [items[k : k + ENCODED_TOGETHER] for k in range(0, len(items), ENCODED_TOGETHER)][process::num_processes]
        lacking = [chunk for chunk in chunks if not all(file_of(item).exists() for item in chunk)]
        yield from tqdm(lacking, desc=desc, unit=f"x{ENCODED_TOGETHER}", disable=process > 0 or not lacking)

    def _pixels(self, k: int) -> Tensor:
        picture = self.pictures[k]
        try:
            with Image.open(picture.path) as opened:
                upright = ImageOps.exif_transpose(opened) if _has_exif(opened) else opened
                return self.placements[k].cut(to_rgb(upright))
        except Exception as error:  # decoders raise errors of every kind on damaged files
            raise InputError(f"line {picture.line}: {picture.path} cannot be decoded ({first_line(error)}); mend it or remove the line") from None

    def text(self, captions: Sequence[str | None], device: torch.device | str = "cpu") -> Text:
        """What the encoders say of captions, float32. None is what guidance starts from: zeros or the empty caption, as the pipeline says."""
        read = [load_file(self._text_file(caption or "")) for caption in captions]
        if self.zero_null:
            read = [{name: tensor * (caption is not None) for name, tensor in one.items()} for one, caption in zip(read, captions, strict=True)]
        return Text(*(torch.stack([one[name] for one in read]).float().to(device, non_blocking=True) for name in Text._fields))

    def batch(self, items: Tensor, dropped: Tensor, device: torch.device | str = "cpu") -> Batch:
        """Read items (n,) of one bucket, float32, those of `dropped` (n,) bool without their captions; torch's global generator draws the posterior's noise."""
        ks = items.tolist()
        moments = torch.stack([load_file(self._latents[k])["moments"] for k in ks]).float()
        captions = [None if drop else self.pictures[k].text for k, drop in zip(ks, dropped.tolist(), strict=True)]
        time_ids = torch.tensor([[*self.pictures[k].size, p.top, p.left, *p.bucket] for k in ks for p in [self.placements[k]]], dtype=torch.float32)
        return Batch(draw_latents(moments, None, self.scaling_factor).to(device, non_blocking=True), self.text(captions, device), time_ids.to(device))


class UnencodedPictures(EncodedPictures):
    """Captioned pictures of which only the shapes count, for a plan: one caption and one picture are encoded, nothing is read or written."""

    @torch.no_grad()
    def encode(self, pipe: StableDiffusionXLPipeline, more_captions: Sequence[str] = (), process: int = 0, num_processes: int = 1) -> None:
        """Find out the shapes, and what is left to encode; the first caption and a picture of noise stand for all."""
        embeds, _, pooled, _ = pipe.encode_prompt([self.pictures[0].text], do_classifier_free_guidance=False)
        self._embeds, self._pooled = embeds.float().cpu(), pooled.float().cpu()
        self._channels, self._downsampling = pipe.vae.config.latent_channels, pipe.vae_scale_factor
        captions = {picture.text for picture in self.pictures} | {"", *more_captions}
        self.captions_left = sum(not self._text_file(caption).exists() for caption in captions)
        self.pictures_left = [k for file, k in {file: k for k, file in enumerate(self._latents)}.items() if not file.exists()]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache will grow by."""
        text = 2 * (self._embeds.numel() + self._pooled.numel())
        areas = sum(math.prod(self.placements[k].bucket) for k in self.pictures_left)
        return self.captions_left * text + 2 * 2 * self._channels * areas // self._downsampling**2

    def text(self, captions: Sequence[str | None], device: torch.device | str = "cpu") -> Text:
        """The one caption, for each."""
        return Text(*(part.expand(len(captions), *part.shape[1:]).to(device) for part in (self._embeds, self._pooled)))

    def batch(self, items: Tensor, dropped: Tensor, device: torch.device | str = "cpu") -> Batch:
        """Noise of the items' shape."""
        height, width = self.placements[int(items[0])].bucket
        latents = torch.randn(len(items), self._channels, height // self._downsampling, width // self._downsampling)
        return Batch(latents.to(device), self.text([None] * len(items), device), torch.zeros(len(items), 6, device=device))


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    halves = {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise InputError("the frozen models give values that float16 cannot hold; check their weights")
    with atomic_path(path) as temporary:
        save_file(halves, temporary)
