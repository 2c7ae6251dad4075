"""Words for emoji: captions of the drawings, the tokenizer that reads them, the text encoder in front of the U-Nets.

A caption is drawn anew each time a picture is seen: its name alone, with skin tone and style, an older name, the category, some words, or nothing.
So "red heart", "dog face, twitter style" and "food" are all words that the models know, and the empty caption is what guidance starts from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tstitch.checkpoints import first_line
from tstitch.errors import InputError
from tstitch.files import atomic_path, read_json
from tstitch.torchvision_compat import prepare_torchvision

prepare_torchvision()
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 1024  # with 96 channels a fifth of a megabyte
CAPTION_LENGTH = 24  # tokens, START and END among them
TEXT_WIDTH = 96

Caption = dict[str, Any]


def join_caption(name: str, skin_tone: str = "", style: str = "") -> str:
    """A caption: "waving hand, medium skin tone, google style"; what is empty is left out."""
    return ", ".join(part for part in (name, skin_tone, f"{style} style" if style else "") if part)


def read_captions(path: Path, count: int) -> list[Caption]:
    """Read captions.jsonl, a line for each of `count` features: "names" (a list), "skin_tone", "style", "category" and "emoji" (texts).

    Raises:
        InputError: if the file is missing, a line cannot be used, or there are not `count` lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"no captions at {path} ({error.strerror}); make them with python assets/emoji/write_captions.py, or pass --captions") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; make it again with python assets/emoji/write_captions.py") from None
    captions = []
    for number, line in enumerate(lines, 1):
        try:
            caption = json.loads(line)
            names, texts = caption["names"], [caption[key] for key in ("skin_tone", "style", "category", "emoji")]
            if not (isinstance(names, list) and names and all(isinstance(text, str) for text in names + texts)):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(
                f"{path} line {number} is no caption; it needs names (a list of texts), skin_tone, style, category and emoji (texts); make the file again"
            ) from None
        captions.append(caption)
    if len(captions) != count:
        raise InputError(f"{path} has {len(captions)} captions, the features are {count}; make both from the same drawings")
    return captions


def emoji_numbers(captions: Sequence[Caption]) -> torch.Tensor:
    """Which emoji each item shows, (N,) in 0..number of emoji - 1: one number for all its skin tones and styles."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(caption["emoji"], len(numbers)) for caption in captions])


def draw_text(caption: Caption, draw: random.Random, empty: float = 0.1) -> str:
    """One of the ways to say a caption; a share `empty` of the draws is the empty text."""
    kind = draw.random()
    if kind < empty:
        return ""
    style = caption["style"] if draw.random() < 0.6 else ""
    if kind < empty + 0.05:
        return join_caption(caption["category"], style=style)
    name = caption["names"][0] if draw.random() < 0.7 else draw.choice(caption["names"])
    text = join_caption(name, caption["skin_tone"] if draw.random() < 0.85 else "", style)
    if kind < empty + 0.15:
        words = text.split()
        text = " ".join([word for word in words if draw.random() < 0.7] or [draw.choice(words)])
    return text


def draw_texts(captions: Sequence[Caption], empty: float = 0.1) -> list[str]:
    """A text for each caption, from torch's global generator."""
    draw = random.Random(int(torch.randint(2**62, ())))
    return [draw_text(caption, draw, empty) for caption in captions]


def vocabulary_texts(captions: Iterable[Caption]) -> list[str]:
    """What the tokenizer learns from: every name once, however many drawings show it, and the words of skin tones, styles and categories."""
    texts = {name for caption in captions for name in caption["names"]}
    return sorted(texts | {join_caption(caption["category"], caption["skin_tone"], caption["style"]) for caption in captions})


def build_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY, length: int = CAPTION_LENGTH) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte pairs are learned from `texts`; any other text is read too, letter by letter where need be.

    Args:
        vocabulary: most tokens, at least those of the printable ASCII letters, alone and at the end of a word.
        length: tokens of a padded text.
    """
    learner = CLIPTokenizer().backend_tokenizer
    pieces = (piece for text in texts for piece, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(text)))
    letters = sorted({letter for piece in pieces for letter in piece} | {chr(code) for code in range(33, 127)})
    # Said as special tokens, letters have a fixed number each; the learner would number them as they come out of a hash table, another way each time.
    known = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    trainer = BpeTrainer(vocab_size=vocabulary, special_tokens=known, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    return CLIPTokenizer(learned["vocab"], [tuple(merge) for merge in learned["merges"]], model_max_length=length)


def tokenizer_hash(tokenizer: CLIPTokenizer) -> str:
    """16 hex digits that tell whether two tokenizers read alike."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return hashlib.sha256(json.dumps([model["vocab"], model["merges"]], sort_keys=True).encode()).hexdigest()[:16]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of 96 channels: a quarter of a million weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu", projection_dim=TEXT_WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Tokens (N, length), padded and cut as Stable Diffusion's pipelines do."""
    return tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids


def write_component(component: Any, folder: Path) -> None:  # noqa: ANN401  (whatever has save_pretrained)
    """Write a part of a pipeline in its library's own format; each of its files appears whole."""
    with tempfile.TemporaryDirectory() as temporary:
        component.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            if file.suffix == ".json":
                _tidy(file)
            with atomic_path(folder / file.name) as whole:
                shutil.copyfile(file, whole)


def _tidy(file: Path) -> None:
    """Leave out where a tokenizer was read from, and the indentation that is half of its file.

    Weights that are stored in float16 are computed with in the type that is asked for: float32 if none is, and not what the file says.
    """
    content = read_json(file)
    if content.get("dtype") == "float16":
        content["dtype"] = "float32"
    for key in ("is_local", "local_files_only", "name_or_path"):
        content.pop(key, None)
    file.write_text(json.dumps(content, separators=(",", ":")) if file.name == "tokenizer.json" else json.dumps(content, indent=2) + "\n")


def save_text(folder: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Write folder/tokenizer and folder/text_encoder, in fp16."""
    write_component(tokenizer, folder / "tokenizer")
    write_component(copy.deepcopy(text_encoder).half(), folder / "text_encoder")


def load_text(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Read what `save_text` wrote; the encoder in float32.

    Raises:
        InputError: if the folder holds no tokenizer and text encoder, or damaged ones.
    """
    for needed in (folder / "tokenizer" / "tokenizer.json", folder / "text_encoder" / "model.safetensors"):
        if not needed.exists():
            raise InputError(f"no file {needed}; pass the pipeline folder of a U-Net that was trained with its text encoder")
    try:
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, local_files_only=True)
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), text_encoder
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the tokenizer or text encoder of {folder} is damaged ({first_line(error)}); copy it again, or train it again") from None
