"""Models by their name on the Hugging Face hub: from its cache at once where it cannot be reached, and one sentence that says why one is not to be had."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import constants, get_session
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors import SafetensorError

from tstitch.checkpoints import first_line
from tstitch.errors import InputError

_NO_CONNECTION = (httpx.ConnectError, httpx.ConnectTimeout)
_REMEMBERED = 60.0  # seconds for which a hub out of reach is not asked again: a model has many parts, and each attempt may take as long as its time-out
_turn = threading.RLock()  # the library's switch is of the whole process: two loads at once would each put back what the other had set
_silent_until = 0.0  # on the clock of time.monotonic


@contextmanager
def from_hub(source: str | Path, what: str = "", pass_instead: str = "a folder in diffusers format") -> Iterator[None]:
    """Read a model inside, by a library that asks the hub for what is no folder or file here.

    Where no connection to the hub can be opened, its cache alone is read: the hub's library would try again for 23 seconds, file by file. Threads take turns.

    Args:
        source: a hub name, a folder or a file.
        what: what the model is, for the sentence, e.g. "the LoRA".
        pass_instead: what works without the hub.

    Raises:
        InputError: if the library fails: the terms of the model were not accepted, there is no such model, there is no network, a file is damaged, or another
            reason in the library's words.
    """
    with _turn:
        remote, offline = not Path(source).expanduser().exists(), constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = offline or (remote and not _hub_answers())
        try:
            yield
        except (OSError, ValueError, RuntimeError, LookupError, SafetensorError, httpx.HTTPError) as error:
            reason, advice = _explain(error, source, remote, offline, pass_instead)
            raise InputError(f"could not load {what}{' ' if what else ''}{source} ({reason}); {advice}") from None
        finally:
            constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    """Whether a connection to the hub can be opened; a slow answer, or an angry one, is an answer."""
    global _silent_until
    if time.monotonic() < _silent_until:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except _NO_CONNECTION:
        _silent_until = time.monotonic() + _REMEMBERED
        return False
    except httpx.HTTPError:
        pass
    return True


def _explain(error: BaseException, source: str | Path, remote: bool, offline: bool, pass_instead: str) -> tuple[str, str]:
    """Why a model could not be read, and what to do; libraries hide the hub's own error behind theirs."""
    chain = [error]
    while (hidden := chain[-1].__cause__ or chain[-1].__context__) and hidden not in chain:
        chain.append(hidden)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if caused_by(GatedRepoError):
        return "the hub gives it only to those who accepted its terms", f"accept them at {constants.ENDPOINT}/{source}, and log in: hf auth login"
    if caused_by(RepositoryNotFoundError):
        return "it is no folder here, and the hub has no such model", "check the name, or log in if the model is private: hf auth login"
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError):
        if offline:
            return "it is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set", f"unset that, or pass {pass_instead}"
        return "it is no folder here and not in the hub's cache, and the hub cannot be reached", f"connect to the hub, or pass {pass_instead}"
    if caused_by(SafetensorError, json.JSONDecodeError, UnicodeDecodeError, EOFError):
        return f"a file is damaged: {first_line(error)}", "remove it from the hub's cache, to fetch it again" if remote else "copy it again"
    return first_line(error), f"pass {pass_instead}" + (", or another model of the hub" if remote else ", or a hub name")
