"""Is this machine ready? Versions, devices, weights, disk, and one step with the bundled models."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tstitch.checkpoints.weights import file_hash
from tstitch.presets import PRESETS, ROOT, SIT_PRESETS

WEIGHTS = ROOT / "pretrained_models"


@dataclass(frozen=True)
class Finding:
    """One line of the examination: "ok", "differs" (works, but is not what was tested), "missing" or "failed"."""

    what: str
    state: str
    detail: str
    needed: bool = False

    @property
    def bad(self) -> bool:
        """Whether something that is needed is missing or fails."""
        return self.needed and self.state in ("missing", "failed")


def examine() -> Iterator[Finding]:
    """Look at everything, cheapest first; the last finding takes some seconds."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield from _weights()
    yield _disk()
    yield _one_step()


def _python() -> Finding:
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Finding("Python", "ok" if fits else "differs", f"{platform.python_version()}, tested with 3.10 to 3.12")


def _packages() -> Iterator[Finding]:
    purpose = ""  # the heading that a pin stands under; what stands under none is needed
    for line in (ROOT / "requirements.txt").read_text().splitlines()[1:]:
        purpose = line.removeprefix("# ") if line.startswith("#") else purpose
        if pin := re.match(r"([\w.-]+)==([\w.]+)", line):
            name, pinned = pin.groups()
            try:
                found = version(name)
            except PackageNotFoundError:
                yield Finding(name, "missing", f"pip install {name}=={pinned}{purpose and f', for {purpose}'}", not purpose)
                continue
            same = found.split("+")[0] == pinned  # a build's own suffix, such as +cpu, is no other version
            yield Finding(name, "ok" if same else "differs", found if same else f"{found}, tested with {pinned}", not purpose)


def _devices() -> Iterator[Finding]:
    yield _device("cpu", f"{torch.get_num_threads()} threads", needed=True)
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        yield _device(f"cuda:{k}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        yield _device("mps", "Apple")


def _device(name: str, detail: str, needed: bool = False) -> Finding:
    works = _multiplies(name, torch.float32)
    return Finding(name, "ok" if works else "failed", f"{detail}, {'bf16' if _multiplies(name, torch.bfloat16) else 'no bf16'}", needed)


def _multiplies(device: str, dtype: torch.dtype) -> bool:
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype)
        return float((ones @ ones)[0, 0]) == 8
    except (RuntimeError, TypeError):
        return False


def _weights() -> Iterator[Finding]:
    for preset in (*PRESETS.values(), *SIT_PRESETS.values()):
        bundled = preset.name == "emoji"
        files = {f"emoji {file.path.stem}" if bundled else f"{preset.name} {file.model}": file.path for file in preset.denoisers}
        if preset is PRESETS["emoji"]:
            files["emoji autoencoder"] = Path(preset.vae) / "diffusion_pytorch_model.safetensors"
        for what, path in files.items():
            shown = path.relative_to(ROOT)
            if path.is_file():
                yield Finding(what, "ok", f"{shown}, sha256 {file_hash(path)}", bundled)
            else:
                yield Finding(what, "missing", f"{shown}; {'restore it' if bundled else 'pretrained_models/readme.txt says where it comes from'}", bundled)


def _disk() -> Finding:
    used = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    return Finding("disk", "ok", f"pretrained_models takes {used / 2**20:.0f} MiB, {shutil.disk_usage(ROOT).free / 2**30:.1f} GiB are free")


def _one_step() -> Finding:
    # In a process of its own, as a user would: this package imports no backbone.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dit" / "sample.py"), "--preset", "emoji", "--num-sampling-steps", "1", "--class-labels", "0"]
        done = subprocess.run([*command, "--save_dir", folder], capture_output=True, text=True)
        if done.returncode == 0 and (Path(folder) / "sample.png").is_file():
            return Finding("one step", "ok", "dit/sample.py with the emoji models", needed=True)
    return Finding("one step", "failed", (done.stderr.strip().splitlines() or ["dit/sample.py wrote no picture"])[-1], needed=True)
