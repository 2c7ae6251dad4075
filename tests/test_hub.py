"""A model that is not to be had from the hub says why, and nobody waits for a hub that cannot be reached."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from diffusers import UNet2DConditionModel
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from sd_tiny import save_tiny_pair

from sd.tstitch_sd_utils import get_tstitch_pipepline, read_part
from tstitch import hub
from tstitch.autoencoder import Autoencoder
from tstitch.errors import InputError
from tstitch.hub import from_hub

NAME = "owner/model"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks the hub for the first time."""
    monkeypatch.setattr(hub, "_silent_until", 0.0)


def session(answer: Exception | None, asked: list[str] | None = None) -> SimpleNamespace:
    """The hub's client, in place of the network; `asked` grows by each address that is asked for."""

    def head(url: str, **how: object) -> None:
        if asked is not None:
            asked.append(url)
        if answer is not None:
            raise answer

    return SimpleNamespace(head=head)


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session(None))


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often the hub was asked in vain."""
    asked: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session(httpx.ConnectError("no route"), asked))
    return asked


def http(kind: type[Exception], status: int) -> Exception:
    return kind("told by the hub", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize("hidden", [False, True], ids=["bare", "behind diffusers' own"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http(GatedRepoError, 403), r"accepted its terms\); accept them at https://.*/owner/model, and log in: hf auth login"),
        (http(RepositoryNotFoundError, 404), r"the hub has no such model\); check the name, or log in if the model is private"),
        (LocalEntryNotFoundError("nothing cached"), r"not in the hub's cache, and the hub cannot be reached\); connect to the hub, or pass a folder"),
        (httpx.ReadTimeout("slow"), r"the hub cannot be reached\); connect to the hub"),
        (SafetensorError("header too large"), r"a file is damaged: .*\); remove it from the hub's cache, to fetch it again"),
        (json.JSONDecodeError("no value", "", 0), r"a file is damaged: .*\); remove it"),
        (http(RemoteEntryNotFoundError, 404), r"\(.*\); pass a folder in diffusers format, or another model of the hub"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_reason_for_which_the_hub_gives_no_model_has_its_own_advice(
    error: Exception, said: str, hidden: bool, reachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **how: object) -> None:
        if not hidden:
            raise error
        try:
            raise error
        except type(error):
            raise OSError("Can't load config")  # noqa: B904  (as diffusers does)

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", load)
    with pytest.raises(InputError, match=rf"^could not load {NAME} .*{said}") as refused:
        read_part(UNet2DConditionModel, NAME, variant="fp16")
    assert "\n" not in str(refused.value)


def test_a_damaged_file_of_a_folder_is_to_be_copied_again(tmp_path: Path) -> None:
    large, small = save_tiny_pair(tmp_path)
    file = large / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"could not load .*large \(a file is damaged: .*\); copy it again"):
        get_tstitch_pipepline(large, small, device="cpu")


def test_a_hub_out_of_reach_is_not_asked_a_second_time_soon(unreachable: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"the autoencoder owner/model \(.*the hub cannot be reached\); connect to the hub, or pass its folder with --vae"):
        Autoencoder(NAME, "cpu")
    with pytest.raises(InputError, match=r"could not load owner/model .*the hub cannot be reached"):
        get_tstitch_pipepline(NAME, NAME, device="cpu", cache_dir=tmp_path)
    with from_hub(NAME):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert len(unreachable) == 1
    later = time.monotonic() + 61
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: later))
    with from_hub(NAME):
        assert len(unreachable) == 2


def test_what_is_in_the_cache_is_read_without_the_hub(unreachable: list[str], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1234")
    with from_hub(NAME):
        assert Path(hf_hub_download(NAME, "config.json", cache_dir=tmp_path)) == snapshot / "config.json"


@pytest.mark.parametrize("answer", [None, httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("angry")], ids=["prompt", "slow", "angry"])
def test_a_hub_that_answers_at_all_is_asked(answer: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session(answer))
    with from_hub(NAME):
        assert not constants.HF_HUB_OFFLINE


def test_a_folder_is_read_without_a_look_at_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "get_session", None)  # called, it would be a TypeError
    with from_hub(tmp_path):
        pass


def test_who_set_the_hub_offline_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"), from_hub(NAME):
        hf_hub_download(NAME, "config.json", cache_dir=tmp_path)
    assert constants.HF_HUB_OFFLINE


def test_loads_of_two_threads_leave_the_switch_as_it_was(unreachable: list[str]) -> None:
    inside, other_began = threading.Event(), threading.Event()

    def other() -> None:
        assert inside.wait(10)
        other_began.set()
        with from_hub(NAME):
            pass

    thread = threading.Thread(target=other)
    thread.start()
    with from_hub(NAME):
        inside.set()
        assert other_began.wait(10)
        thread.join(0.2)  # without turns it reads the switch now, and puts that back
        assert thread.is_alive()
        assert constants.HF_HUB_OFFLINE
    thread.join(10)
    assert not thread.is_alive()
    assert not constants.HF_HUB_OFFLINE
