"""Runs that can be stopped, and errors that are sentences.

A thread cannot be ended from outside, so a run asks between two steps whether it is still wanted. Every user has at most one run in each tab.
"""

from __future__ import annotations

import html
import threading
import traceback
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import gradio as gr

from tstitch.errors import InputError


class Stopped(Exception):  # noqa: N818  (what happened is no error)
    """The user asked for the end of this run."""


class Jobs:
    """The runs of all users."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, threading.Event] = {}

    @contextmanager
    def run(self, owner: Hashable) -> Iterator[threading.Event]:
        """Register a run while the block lasts; the event is set when it is to stop. An older run of the same owner is stopped."""
        event = threading.Event()
        with self._lock:
            if owner in self._running:
                self._running[owner].set()
            self._running[owner] = event
        try:
            yield event
        finally:
            with self._lock:
                if self._running.get(owner) is event:
                    del self._running[owner]

    @staticmethod
    def check(event: threading.Event) -> None:
        """Raise `Stopped` if the run is to stop."""
        if event.is_set():
            raise Stopped

    def stop(self, owner: Hashable) -> bool:
        """Stop the run of an owner; False if there is none."""
        with self._lock:
            event = self._running.get(owner)
        if event is not None:
            event.set()
        return event is not None

    def stop_all(self, session: str) -> None:
        """Stop every run of a user who has left; owners are (session, tab)."""
        with self._lock:
            owners = [owner for owner in self._running if owner[0] == session]
        for owner in owners:
            self.stop(owner)


@contextmanager
def messages() -> Iterator[None]:
    """End quietly if stopped, and show an error as a message on the page.

    What the user can mend is said in one sentence. Anything else is our defect, whose traceback goes to the log.
    """
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error)), title="Please change something", print_exception=False) from None
    except Stopped:
        pass
    except gr.Error:
        raise
    except Exception as error:
        traceback.print_exc()
        if "out of memory" in str(error).lower():
            raise gr.Error("The device ran out of memory; ask for fewer pictures.", title="Out of memory", print_exception=False) from None
        sentence = f"{type(error).__name__}; the server's log says more. Please try again with other settings."
        raise gr.Error(html.escape(sentence), title="The server failed", print_exception=False) from None
