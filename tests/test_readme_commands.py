"""Every command of the documents does what it says.

Each command of a bash block is one of three:

- it runs, as printed, in a temporary folder that holds copies of what it may write, and writes what its flags announce (SMALLER makes it short);
- it lacks published weights, a dataset or one's own pictures, and says so in one sentence with exit code 2, naming one of them: the file is known to be
  somebody else's (REPRODUCIBILITY.md, pretrained_models/readme.txt), or in ONES_OWN;
- it is not started, for a reason that holds by rule: it sets the shell up, fetches packages, serves a page, or runs for hours; what such a script calls is
  held to the words that those programs take.

A command that is none of these fails. The commands under one heading run in their order, one after another, as a reader would.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from test_readme import DOCUMENTS

from assets.emoji import encode_latents, write_pictures
from tstitch import presets
from tstitch.errors import InputError
from tstitch.presets import EMOJI_CLASSES, ROOT

# EXPERIMENTS.md has its own program: make experiments runs its rows.
READ = [path for path in DOCUMENTS if path.name != "EXPERIMENTS.md"]

# What is appended, to be short: fewer pictures, steps or rounds. Of a flag that is given twice, argparse takes the last.
SAMPLE = "--num-sampling-steps 2 --num-images 2 --max-batch 2"
TRAIN = "--max-steps 2 --global-batch-size 4 --ckpt-every 1 --log-every 1"
BENCH = "--rounds 1 --no-gate --device cpu"
SMALLER = {
    "": "",
    "assets/emoji/make_card.py": f"{SAMPLE} --models pretrained_models/emoji",  # not the repository's own
    "assets/emoji/train_features.py": "--max-steps 2 --batch-size 4",
    "assets/emoji/train_vae.py": "--max-steps 2 --batch-size 2",
    "benchmarks/feature_loading.py": f"{BENCH} --count 100 --batch-size 2 --steps 2",
    "benchmarks/forward.py": f"{BENCH} --models emoji-small --input-size 8 --batches 1",
    "benchmarks/generation.py": f"{BENCH} --num-fid-samples 2 --num-sampling-steps 1 --few 10 --times 2",
    "benchmarks/sampling.py": f"{BENCH} --models emoji-small --input-size 8 --batch 1 --num-steps 2",
    "benchmarks/stitch_overhead.py": f"{BENCH} --ratios 0.5 --num-images 1 --num-sampling-steps 2",
    "benchmarks/sweep.py": f"{BENCH} --models emoji-small emoji-base --parts 2 --num-steps 2 --cfg-scale 2",
    "benchmarks/train_speed.py": f"{BENCH} --model emoji-small --batch-size 2 --image-size 32",
    "benchmarks/training_loop.py": f"{BENCH} --batch-size 2 --count 20",
    "benchmarks/unets.py": f"{BENCH} --num-steps 2 --switches channels-last",
    "benchmarks/report.py": "--readme benchmarks/README.md --results benchmarks/results",
    "dit/sample.py": SAMPLE,
    "dit/sample_ddp_t_stitch.py": "--num-fid-samples 6 --num-sampling-steps 2 --per-proc-batch-size 2",
    "dit/sample_t_stitch.py": SAMPLE,
    "dit/similarity.py": "--num-images 2 --num-sampling-steps 3",
    "dit/sweep_emoji.py": "--num-images 2 --num-sampling-steps 2 --ratios 0 0.5 --no-mixes",
    "dit/train.py": TRAIN,
    "dit/train.py --eval-every": f"{TRAIN} --eval-images 2 --eval-every 2",
    "dit/tune.py --latency": "--latency 100",  # a slow machine has no schedule for the printed one, and says so
    "dit/visualize_sampling_freq.py": "--num-images 2 --num-sampling-steps 3",
    "ldm/main.py": "lightning.trainer.max_steps=2 data.params.batch_size=2",
    "ldm/scripts/sample_imagenet_32_t_stitch.py": SAMPLE,
    "sd/sd_demo.py": "--steps 2 --ratios 0 0.5",
    "sd/train_text_to_image.py": TRAIN,
    "sit/sample.py ODE": f"{SAMPLE} --atol 0.1 --rtol 0.1",
    "sit/sample.py ODE --sampling-method": f"{SAMPLE} --num-sampling-steps 3",
    "sit/sample.py SDE": f"{SAMPLE} --num-sampling-steps 3",
    "sit/sample_ddp.py --likelihood": "--num-likelihood-samples 2 --atol 0.1 --rtol 0.1",
    "sit/sample_ddp.py SDE": "--num-fid-samples 2 --num-sampling-steps 3",
    "sit/sample_t_stitch.py ODE": f"{SAMPLE} --atol 0.1 --rtol 0.1",
    "sit/sample_t_stitch.py ODE --sampling-method": f"{SAMPLE} --num-sampling-steps 3",
    "sit/sample_t_stitch.py SDE": f"{SAMPLE} --num-sampling-steps 3",
    "sit/train.py": TRAIN,
}

# Not started: what a target of the Makefile or a program does that no test should. `make demo` is no such: what it calls is run.
MAKE = {
    "bench": "minutes",
    "bench-check": "minutes",
    "docs": "installs pdoc",
    "experiments": "hours",
    "test": "this is a part of it",
    "test-slow": "this is a part of it",
    "web": "serves a page until it is stopped",
}
FETCHES = {"assets/emoji/build_dataset.py", "assets/emoji/write_captions.py"}  # npm packages
HOURS = {"experiments/run.py"}  # whose rows tests/test_experiments.py looks at

# What a reader brings along, and no repository can hold.
ONES_OWN = {"imagenet/train", "/path/to/imagenet/train", "features", "house.jpg", "tree.jpg", "dancer.jpg"}
PUBLISHED = (ROOT / "REPRODUCIBILITY.md").read_text() + (ROOT / "pretrained_models" / "readme.txt").read_text()

WRITTEN_TO = ("assets", "benchmarks", "pretrained_models/emoji")  # tracked folders that some commands write to: in a copy
OUTPUTS = ("out", "save_dir", "json", "export", "results_dir", "sample_dir", "run_dir", "pipeline", "output_dir", "save_statistics")
SLOW = {  # headings under which something takes more than some seconds, however small it is made
    "assets/emoji/README.md: The emoji default",
    "benchmarks/README.md: The FID generator",
    "benchmarks/README.md: What makes training fast",
    "dit/README.md: What makes training fast",
}


@dataclass(frozen=True)
class House:
    """A folder in which commands run, what ran there, and what it announced to write."""

    root: Path
    done: set[tuple[str, ...]] = field(default_factory=set)
    made: set[Path] = field(default_factory=set)


@dataclass(frozen=True)
class Command:
    """A command of a document: its words without launcher, variables and comment."""

    document: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {shlex.join(self.words)}"

    @property
    def program(self) -> str:
        """Script, `make TARGET`, or module behind -m."""
        return " ".join(self.words[:2]) if self.words[0] in ("make", "-m") else self.words[0]

    @property
    def arguments(self) -> list[str]:
        return list(self.words[2 if self.words[0] in ("make", "-m") else 1 :])

    @property
    def smaller(self) -> str:
        """What makes it short: of the keys whose words are all in the command, the one with most."""
        words = {self.program, *self.words}
        short = SMALLER[max((key for key in SMALLER if words.issuperset(key.split())), key=lambda key: len(key.split()), default="")]
        own = short.startswith(BENCH) and "--json" not in words  # else where the command says
        return short + " --json results/bench.json" * own

    def module(self) -> ModuleType:
        name = self.words[1] if self.words[0] == "-m" else self.program.removesuffix(".py").replace("/", ".")
        return importlib.import_module(f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name)


def without_launcher(words: list[str]) -> list[str]:
    """Words from the script on; a launcher or an interpreter that is not known stays where it is."""
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    launched = {"torchrun", "accelerate"} & {words[0]}
    if words[0] in ("bash", "python", ".venv/bin/python"):
        return words[1:]
    return words[next(k for k, word in enumerate(words) if word.endswith(".py")) :] if launched else words


def commands_of(text: str, document: str, first_line: int) -> Iterator[Command]:
    """Commands of the lines of a block; a backslash at the end of a line joins it to the next."""
    held, begun = "", 0
    for number, line in enumerate(text.splitlines(), first_line):
        held, begun = held + line, begun or number
        if line.endswith("\\"):
            held = held[:-1]
            continue
        words = shlex.split(held, comments=True)
        if words:
            yield Command(document, begun, tuple(without_launcher(words)))
        held, begun = "", 0


def sections() -> dict[str, list[Command]]:
    """Commands of all documents by heading, in their order."""
    found: dict[str, list[Command]] = {}
    for path in READ:
        document, heading, language, block, start = str(path.relative_to(ROOT)), "", None, "", 0
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.startswith("```"):
                if language == "bash":
                    found.setdefault(f"{document}: {heading}", []).extend(commands_of(block, document, start))
                language, block, start = (line[3:].strip() if language is None else None), "", number + 1
            elif language is not None:
                block += line + "\n"
            elif line.startswith("#"):
                heading = line.lstrip("#").strip()
    return found


SECTIONS = sections()


def build_house(root: Path) -> House:
    """A folder that looks like the repository's root: links to code, copies of what commands write to, and stand-ins for data that takes long to make."""
    root.mkdir()
    for entry in ROOT.iterdir():
        if entry.name in ("dit", "sit", "ldm", "sd", "tstitch", "tests", "Makefile"):
            (root / entry.name).symlink_to(entry)
    ignore = shutil.ignore_patterns("*.py", "*.pyc", "__pycache__")
    for name in WRITTEN_TO:
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    (root / "data" / "emoji").mkdir(parents=True)
    drawings = root / "data" / "emoji" / "emoji64.npz"
    shutil.copy(ROOT / "assets" / "emoji" / "sample64.npz", drawings)  # 64 of the 7,562 drawings, in the same layout
    encode_latents.main(["--data", str(drawings), "--vae", str(ROOT / "pretrained_models/emoji/vae"), "--out", str(root / "data/emoji/features")])
    with np.load(drawings) as columns:
        rows = [
            {"text": str(name), "names": [str(name)], "skin_tone": "", "style": "google", "category": EMOJI_CLASSES[label].lower(), "emoji": str(k)}
            for k, (name, label, held) in enumerate(zip(columns["name"], columns["label"], columns["held_out"], strict=True))
            if not held
        ]
    (root / "data/emoji/features/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_pictures.main(["--out", str(root / "pictures")])
    captions = [{"file_name": str(path.relative_to(root / "pictures")), "text": path.stem} for path in sorted((root / "pictures").rglob("*.png"))]
    (root / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(caption) + "\n" for caption in captions))
    (root / "runs").mkdir()
    for posenc in ("abs", "rope"):  # the README prints the command for one position encoding, and names the others
        (root / "runs" / f"posenc-{posenc}").symlink_to(root / "runs" / "posenc-gta")
    return House(root)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """One for all documents."""
    return build_house(tmp_path_factory.mktemp("documents") / "house")


def files_in(root: Path) -> dict[Path, int]:
    """Files and when they were written; what is linked belongs to the repository."""
    return {Path(folder, name): (Path(folder) / name).lstat().st_mtime_ns for folder, _, names in os.walk(root) for name in names if name[-4:] != ".pyc"}


def values(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Name and each value of parsed arguments, defaults among them."""
    for name, value in vars(arguments).items():
        for single in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(single, (str, Path)):
                yield name, str(single)


def inputs_that_lack(command: Command, arguments: argparse.Namespace) -> list[str]:
    """Files, folders and models of the hub that a command reads and that are not here."""
    outputs = (*OUTPUTS, "features_path" if "extract" in command.program else "")
    lacking = []
    for name, value in values(arguments):
        value = value.partition("=")[2] or value  # ldm/main.py's key=value
        hub = name not in ("model", "models") and re.fullmatch(r"[A-Za-z][\w.-]*/[\w.-]+", value)
        file = re.search(r"\.(pt|npz|ckpt|safetensors|jpg|json|yaml)$", value)
        if name not in (*outputs, "work_dir") and not Path(value).exists() and (hub or file or name in ("data_path", "features_path", "overrides", "pictures")):
            lacking.append(value)
    # Scripts that take a preset have weights without being told: the published ones.
    if getattr(arguments, "preset", "") is None:
        table = {"dit": presets.PRESETS, "sit": presets.SIT_PRESETS, "ldm": presets.LDM_PRESETS}[command.program.split("/")[0]]
        lacking += [str(file.path) for file in table["imagenet256"].denoisers if not file.path.exists()]
    return lacking


def is_known_to_lack(name: str) -> bool:
    """Whether something is known to be somebody else's."""
    return name in ONES_OWN or name in PUBLISHED or Path(name).name in PUBLISHED


def run_here(command: Command, house: House, capsys: pytest.CaptureFixture) -> None:
    """Run a Python program of the documents, or see that it says what it lacks."""
    if command.words in house.done:  # under another heading
        return
    house.done.add(command.words)
    module = command.module()
    words = [expanded for word in command.arguments for expanded in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    arguments = module.parse_args(words)
    # A benchmark generates into a folder that it removes.
    written = [Path(value) for name, value in values(arguments) if name in OUTPUTS and (name, command.program) != ("sample_dir", "benchmarks/generation.py")]
    lacking = inputs_that_lack(command, arguments)
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds the number type of an earlier command
    before = files_in(house.root)
    capsys.readouterr()
    if lacking:
        unknown = [name for name in lacking if not is_known_to_lack(name) and not any(Path(name).is_relative_to(path) for path in house.made)]
        assert not unknown, f"{command}\nreads {unknown}, which no earlier command made and REPRODUCIBILITY.md does not know"
        with pytest.raises(InputError) as refused:
            module.main(words)
        said = str(refused.value)
        others = [word for word in re.findall(r"pretrained_models/[\w./-]+", said) if is_known_to_lack(word) and not (ROOT / word).exists()]
        assert others or any(name in said for name in lacking if is_known_to_lack(name)), f"{command}\nlacks {lacking}, and says: {said}"
        house.made.update(written)
        return
    module.main([*words, *shlex.split(command.smaller)])
    changed = {path for path, when in files_in(house.root).items() if before.get(path) != when}
    missing = [path for path in written if path not in house.made and not any((house.root / path) in (file, *file.parents) for file in changed)]
    assert not missing, f"{command}\nannounced {missing}, and wrote {sorted(changed)[:9]}"
    house.made.update(written)
    assert changed or capsys.readouterr().out.strip(), f"{command}\nwrote nothing, and said nothing"


RECORDER = """#!/usr/bin/env bash
echo "${*@Q}" >> calls  # one write: some scripts train two models at once
while [[ $# -gt 1 ]]; do
    case $1 in --results-dir | --run-dir) mkdir -p "$2"; touch "$2/log.jsonl" ;; esac
    shift
done
"""


def play_shell_script(command: Command, folder: Path) -> None:
    """Run a script of several hours with a Python that only writes down how it was called: each call must be one that the program takes."""
    script = ROOT / command.program
    assert re.search(r"\bhours?\b", script.read_text().split("\n\n")[0].split("set -e")[0]), f"{command}: its first lines do not say that it takes hours"
    copy = folder / command.program
    copy.parent.mkdir(parents=True)
    shutil.copy(script, copy)
    (folder / "recorder").write_text(RECORDER)
    (folder / "recorder").chmod(0o755)
    subprocess.run(["bash", str(copy), *command.arguments], env=os.environ | {"PYTHON": str(folder / "recorder")}, check=True, timeout=60)
    calls = [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]
    assert len(calls) >= 2
    for words in calls:
        called = Command(command.program, 0, tuple(words[next(k for k, word in enumerate(words) if word.endswith(".py")) :]))
        called.module().parse_args(called.arguments)


def outcome(command: Command, house: House, capsys: pytest.CaptureFixture, folder: Path) -> None:
    """Run a command, see it refused, or see that the reason for not starting it holds."""
    program = command.program
    if program == "source":
        assert command.arguments == [".venv/bin/activate"] and ".venv" in (ROOT / "Makefile").read_text()
    elif program.startswith("make "):
        recipe = re.search(rf"^{command.words[1]}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert recipe, f"{command}: the Makefile has no such target"
        if command.words[1] not in MAKE:
            for called in commands_of(recipe[1].replace("$(BIN)/", "").replace("\t", ""), "Makefile", 1):
                outcome(called, house, capsys, folder)
    elif program.endswith(".sh"):
        play_shell_script(command, folder / Path(program).stem)
    elif program in HOURS:
        rows = {row["id"] for row in command.module().read_rows()["rows"] if "emoji" in row}
        assert set(command.module().parse_args(command.arguments).only or ()) <= rows
    elif program in FETCHES:
        assert command.module().parse_args(command.arguments).tarballs is None, f"{command}: needs no network, so run it"
    elif program.endswith(".py") or program.startswith("-m "):
        run_here(command, house, capsys)
    else:
        pytest.fail(f"{command}: of no kind that is known here; say in this file how it is run, or why not")


@pytest.mark.parametrize("section", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SECTIONS])
def test_the_commands_under_a_heading_do_what_they_say(
    section: str, house: House, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if section.startswith("assets/"):  # makes models anew, which then fit nobody else's
        house = build_house(tmp_path / "house")
    monkeypatch.chdir(house.root)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    before = [files_in(ROOT / name) for name in WRITTEN_TO]
    for command in SECTIONS[section]:
        outcome(command, house, capsys, tmp_path)
    assert [files_in(ROOT / name) for name in WRITTEN_TO] == before, "the repository itself was written to"


def test_no_command_stands_in_a_block_of_another_kind() -> None:
    for path in READ:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE):
            assert language in ("bash", "python", ""), (path, language)
            assert language or not re.search(r"^\s*(python|make|bash|torchrun|accelerate|docker|\.venv)\b", block, flags=re.MULTILINE), (path, block)


def test_the_documents_have_their_commands() -> None:
    commands = [command for section in SECTIONS.values() for command in section]
    assert len(commands) >= 80 and set(SECTIONS) >= SLOW
    assert {command.program.split("/")[0] for command in commands} >= {"dit", "sit", "ldm", "sd", "benchmarks", "assets"}
