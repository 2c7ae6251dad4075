"""The documents say what is so: links resolve, flags exist, and Python that needs no published weights runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tstitch.presets import ROOT

DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if not {".venv", "runs", "data", "node_modules"} & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "sit/README.md", "ldm/README.md"])
def test_the_python_of_a_readme_runs(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(example, names)
    assert names["latents"].shape == (len(names["y"]), 4, 16, 16)
    assert 0.3 < names["latents"].std() < 3


def test_every_flag_that_the_documents_name_exists(capsys: pytest.CaptureFixture) -> None:
    checked = 0
    for document in DOCUMENTS:
        for folder, name, rest in re.findall(r"(?<![\w/])(dit|sit|ldm|ldm/scripts|sd|benchmarks)/(\w+)\.py((?:[^\n`#]|\\\n)*)", document.read_text()):
            flags = set(re.findall(r"--[a-zA-Z][\w-]*", rest))
            if flags:
                with pytest.raises(SystemExit):
                    importlib.import_module(f"{folder.replace('/', '.')}.{name}").parse_args(["--help"])
                known = set(re.findall(r"--[a-zA-Z][\w-]*", capsys.readouterr().out))
                assert flags <= known, (document.name, name, flags - known)
                checked += 1
    assert checked >= 60


def test_every_test_that_the_documents_name_exists() -> None:
    defined = set(re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")), flags=re.MULTILINE))
    named = {name for document in DOCUMENTS for name in re.findall(r"`(test_\w+)`", document.read_text())}
    assert len(named) >= 20
    assert named <= defined, named - defined
