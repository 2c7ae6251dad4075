"""The page: a title and a tab for each backbone whose weights are here, or can be fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from sd.page.jobs import Jobs
from sd.page.request import Backbone
from sd.page.tab import Tab

CSS = Path(__file__).with_name("page.css")
TITLE = """# T-Stitch
A small diffusion model takes the first, noisy steps and a large one the rest: faster pictures, with no training. Choose who runs which step, and compare."""


def build_page(backbones: Sequence[Backbone], concurrency: int = 1) -> gr.Blocks:
    """Lay the page out.

    Args:
        backbones: what could be shown; those that are not available are left out.
        concurrency: how many runs go on at once; the others wait in a queue.
    """
    jobs = Jobs()
    with gr.Blocks(title="T-Stitch", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(TITLE, elem_id="title")
        tabs = [Tab(backbone, jobs, concurrency) for backbone in backbones if backbone.available()]
        page.load(**tabs[0].open_event)

        def leave(request: gr.Request) -> None:
            jobs.stop_all(request.session_hash)

        page.unload(leave)
    return page.queue(max_size=64)


def theme() -> gr.Theme:
    """Colours of the page."""
    return gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", spacing_size="sm", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
