"""One tab of the page: a backbone's controls to the left, its pictures to the right."""

from __future__ import annotations

import html
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from sd.page.drawings import WORDS, Point, steps_strip, tradeoff, triangle
from sd.page.jobs import Jobs, messages
from sd.page.request import Backbone, Request, Sample
from tstitch.errors import InputError
from tstitch.schedule import StitchSchedule, three_way_allocations, two_way_ratios

TWO, THREE = "Two models", "Three models"
STEP = 0.05  # of the sliders
RATIO, MIX = 0.4, (0.2, 0.2, 0.6)  # what they start with
AS_BEFORE = [gr.skip()] * 6  # what a run must yield to leave the six outputs as they are: gradio clears those of a run that yields nothing
QUEUE = "sampling"  # all runs of all users wait in one queue


def keep_the_sum(moved: int) -> str:
    """JavaScript that takes three shares and gives the two that were not moved, so that all sum to 1; the two keep their proportion on the grid of STEP.

    It runs in the browser: a late answer of the server would overwrite what is typed meanwhile.
    """
    return f"""(...shares) => {{
        const moved = Math.min(Math.max(shares.splice({moved}, 1)[0], 0), 1), total = shares[0] + shares[1];
        const first = Math.min(Math.round((1 - moved) * (total ? shares[0] / total : 0.5) / {STEP}) * {STEP}, 1 - moved);
        return [first, 1 - moved - first].map((share) => +share.toFixed(9));
    }}"""


def headline(sample: Sample, alone: Sample) -> str:
    """What a schedule costs and gives, in one line."""
    facts = [f"<b>{html.escape(sample.name)}</b>", f"{sample.seconds:.2f} s a picture", f"{sample.speed_up:.2f} times as fast as large alone"]
    if sample.fd_emoji is not None and alone.fd_emoji is not None:
        facts.append(f"FD-emoji {sample.fd_emoji:.2f}, large {alone.fd_emoji:.2f}")
    return f'<div class="headline">{" · ".join(facts)}</div>'


def curve(samples: Sequence[Sample], known: Sequence[Point], chosen: str) -> str:
    """The trade-off of what was just sampled, or of what was measured before where that is little."""
    if len(samples) > 2 and all(sample.fd_emoji is not None for sample in samples):
        points = [Point(s.name, s.speed_up, s.fd_emoji) for s in samples]
        return tradeoff(points, chosen, "FD-emoji (lower is better)", "Speed measured in this run; FD-emoji measured before, with these models and settings.")
    if len(samples) > 2:
        points = [Point(s.name, s.speed_up, s.difference) for s in samples]
        return tradeoff(points, chosen, "difference from large alone, grey levels", "Measured in this run, on these pictures.")
    return tradeoff(known, chosen, "FD-emoji (lower is better)", "Measured before, with these models, at the settings this page opens with.")


class Tab:
    """Components and events of one backbone; build it inside `gr.Blocks`."""

    def __init__(self, backbone: Backbone, jobs: Jobs, concurrency: int) -> None:
        self.backbone, self.jobs, self.concurrency = backbone, jobs, concurrency
        self.opening: list[Sample] = []  # what the tab shows first, once it has been sampled
        self.three = len(backbone.letters) == 3
        self.pair = [backbone.letters[0], backbone.letters[-1]]
        points = backbone.known(backbone.default)
        pairs = {StitchSchedule.from_ratio(k / 20).describe(self.pair) for k in range(21)}
        self.known = {TWO: [p for p in points if p.name in pairs], THREE: points}
        with gr.Tab(backbone.title) as self.tab, gr.Row(equal_height=False):
            with gr.Column(scale=0, min_width=380, elem_classes="controls"):
                self._build_controls()
            with gr.Column(scale=1, min_width=420, elem_classes="results"):
                self._build_results()
        self._connect()

    # -- layout

    def _build_controls(self) -> None:
        backbone, default = self.backbone, self.backbone.default
        if backbone.prompts:
            self.subject = gr.Textbox(default.subject, label="Prompt", lines=2, max_length=1000, elem_classes="subject")
        else:
            self.subject = gr.Dropdown(backbone.subjects, value=default.subject, label="Picture of", elem_classes="subject")
        with gr.Group(visible=len(backbone.large) + len(backbone.small) > 2):
            self.large = gr.Dropdown(list(backbone.large), value=default.large or None, label="Large model", elem_classes="large")
            self.small = gr.Dropdown(list(backbone.small), value=default.small or None, label="Small model")
        self.mode = gr.Radio([TWO, THREE], value=TWO, show_label=False, container=False, visible=self.three, elem_classes="mode")
        self.ratio = gr.Slider(0, 1, value=RATIO, step=STEP, label="Ratio: the small model's share", elem_classes="ratio")
        with gr.Group(visible=False, elem_classes="mix") as self.mix:
            self.triangle = gr.HTML(triangle(MIX))
            self.shares = [
                gr.Slider(0, 1, value=value, step=STEP, label=f"Share of the {word} model", buttons=[], elem_classes=f"share-{word}")
                for word, value in zip(WORDS.values(), MIX, strict=True)
            ]
        self.strip = gr.HTML(steps_strip(StitchSchedule.from_ratio(RATIO), self.pair, default.num_steps), elem_classes="strip-box")
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", min_width=90, scale=3, elem_classes="generate")
            self.sweep = gr.Button("All ratios", min_width=90, scale=3, elem_classes="sweep")
            self.stop = gr.Button("Stop", variant="stop", min_width=60, scale=2, elem_classes="stop")
        with gr.Accordion("Settings", open=True, elem_classes="settings"):
            with gr.Row():
                number = {"precision": 0, "min_width": 90}
                self.seed = gr.Number(default.seed, label="Seed", elem_classes="seed", **number)
                self.steps = gr.Number(default.num_steps, label="Steps", elem_classes="steps", **number)
                self.count = gr.Number(default.count, label="Pictures", elem_classes="count", **number)
            with gr.Row():
                self.guidance = gr.Number(default.guidance, label="Guidance", step=0.5, min_width=90, elem_classes="guidance")
                methods = list(backbone.methods)
                self.method = gr.Dropdown(
                    methods, value=default.method or None, label="Sampler", min_width=90, scale=2, visible=bool(methods), elem_classes="method"
                )
            self.dice = gr.Button("Random seed", size="sm", elem_classes="dice")
            self.negative = gr.Textbox(label="Not in the picture", max_length=1000, visible=backbone.prompts, elem_classes="negative")
        subjects, seeds = zip(*backbone.examples, strict=True)
        rows, labels = [list(row) for row in backbone.examples], [f"{subject}, seed {seed}" for subject, seed in zip(subjects, seeds, strict=True)]
        gr.Examples(rows, [self.subject, self.seed], label="Try", example_labels=labels, cache_examples=False)

    def _build_results(self) -> None:
        self.samples = gr.State([], time_to_live=3600)
        note = self.backbone.note(self.backbone.default)
        self.note = gr.Markdown(note, visible=bool(note), elem_classes="note")
        self.headline = gr.HTML(f'<div class="headline">{html.escape(self.backbone.sentence)}</div>')
        with gr.Row(equal_height=True):
            self.compare = gr.ImageSlider(
                label="Large model alone | stitched", format="png", interactive=False, height=380, max_height=380, min_width=300, buttons=["download"],
                slider_position=38, elem_classes=["compare", "pixels"],  # within a picture, not on the border between two columns
            )  # fmt: skip
            with gr.Column(min_width=300, elem_classes="plot-box"):
                self.plot = gr.HTML(curve([], self.known[TWO], StitchSchedule.from_ratio(RATIO).describe(self.pair)))
        self.gallery = gr.Gallery(
            label="All from the same noise; click one to compare it", format="png", columns=6, height="auto", object_fit="contain", interactive=False,
            allow_preview=False, visible=False, buttons=["download_all"], elem_classes=["sheets", "pixels"],
        )  # fmt: skip
        with gr.Accordion("The same in a terminal", open=False):
            self.command = gr.Textbox(show_label=False, container=False, interactive=False, lines=2, buttons=["copy"], elem_classes="command")

    # -- events

    def _connect(self) -> None:
        where = [self.mode, self.ratio, *self.shares]
        asked = [self.subject, self.negative, self.large, self.small, self.method, self.seed, self.steps, self.guidance, self.count]
        shown = [self.headline, self.compare, self.plot]
        name = self.backbone.title.lower().replace(" ", "_").replace(".", "_").replace("-", "_")
        run = {"concurrency_limit": self.concurrency, "concurrency_id": QUEUE, "show_progress_on": [self.compare]}
        outputs = [self.samples, *shown, self.gallery, self.command]
        self.open_event = {"fn": self.sample_opening, "inputs": [self.samples, *where], "outputs": outputs, "api_visibility": "private", **run}
        self.tab.select(**self.open_event)
        runs = [
            self.generate.click(self.sample, [gr.State(False), *asked, *where], outputs, api_name=name, **run),
            self.sweep.click(self.sample, [gr.State(True), *asked, *where], outputs, api_name=f"{name}_all", **run),
        ]
        self.stop.click(self.stop_run, None, None, concurrency_limit=None, api_visibility="private")  # in the queue, which alone brings messages
        self.stop.click(None, None, None, cancels=runs)

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
        for k, share in enumerate(self.shares):
            share.input(None, self.shares, [other for other in self.shares if other is not share], js=keep_the_sum(k))
        # One event for all controls: always_last keeps the order of the answers of one event, not of two.
        gr.on(
            [control.change for control in (self.mode, self.ratio, *self.shares, self.steps)], self.look,
            [self.samples, self.steps, *where], [self.strip, self.triangle, *shown], **quick,
        )  # fmt: skip
        self.mode.change(self.choose_mode, self.mode, [self.ratio, self.mix, self.sweep], **quick)
        self.gallery.select(self.pick, [self.samples, self.ratio, *self.shares], where, **quick)
        self.dice.click(lambda: random.randrange(10_000), None, self.seed, **quick)
        if self.backbone.methods:
            self.method.change(lambda method: self.backbone.methods[method].num_steps, self.method, self.steps, **quick)
        for component in (self.large, self.small):
            component.change(self.show_note, [self.large, self.small], self.note, **quick)

    def schedule(self, mode: str, ratio: float | None, *shares: float | None) -> StitchSchedule:
        """The schedule that the sliders show.

        Raises:
            InputError: if one of them is empty, or the shares of three models do not sum to 1.
        """
        if None in (ratio, *shares):
            raise InputError("a share of the models is empty; type a number from 0 to 1")
        return StitchSchedule.from_ratio(ratio) if mode == TWO else StitchSchedule(shares)

    def letters(self, mode: str) -> list[str]:
        """Models that a schedule runs on."""
        return self.pair if mode == TWO else list(self.backbone.letters)

    def choose_mode(self, mode: str) -> list[Any]:
        """Show the sliders of two or of three models."""
        return [gr.update(visible=mode == TWO), gr.update(visible=mode == THREE), "All ratios" if mode == TWO else "All mixes"]

    def look(self, samples: list[Sample], num_steps: int | None, mode: str, *where: float | None) -> list[Any]:
        """Follow the controls: steps, triangle, plot, and the pictures where they have been sampled already."""
        shares = where[1:]
        half_typed = num_steps is None or not 2 <= num_steps <= self.backbone.max_steps or None in where
        if half_typed or (mode == THREE and abs(sum(shares) - 1) > 1e-6):  # the browser moves one share after the other
            return [gr.skip()] * 5
        with messages():
            schedule = self.schedule(mode, *where)
            name = schedule.describe(self.letters(mode))
            found = next((sample for sample in samples if sample.name == name), None)
            pictures = [headline(found, samples[0]), (samples[0].sheet, found.sheet)] if found else [gr.skip(), gr.skip()]
            return [steps_strip(schedule, self.letters(mode), num_steps), triangle(shares), *pictures, curve(samples, self.known[mode], name)]

    def pick(self, event: gr.SelectData, samples: list[Sample], ratio: float, *shares: float) -> list[Any]:
        """Set the sliders to the schedule of a picture of the gallery."""
        fractions = samples[event.index].schedule.fractions
        if len(fractions) == 2:
            return [TWO, fractions[0], *shares]
        return [THREE, ratio, *fractions]

    def show_note(self, large: str, small: str) -> Any:  # noqa: ANN401  (an update)
        """Say whether the weights of other models are here."""
        note = self.backbone.note(Request("-", large=large or "", small=small or ""))
        return gr.update(value=note, visible=bool(note))

    def sample(
        self, every: bool, subject: str, negative: str, large: str, small: str, method: str, seed: int, steps: int, guidance: float, count: int,
        mode: str, ratio: float, s: float, b: float, l: float, request: gr.Request, progress: gr.Progress = gr.Progress(),  # noqa: B008, E741  (as gradio has it)
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Sample the schedule of the sliders; with `every` ratios 0, 0.1, ..., 1, or all mixes of three models in fifths."""
        with messages():
            asked = Request(subject, seed, steps, guidance, count, method or "", negative or "", large or "", small or "")
            schedule = self.schedule(mode, ratio, s, b, l)
            schedules = [schedule] if not every else two_way_ratios() if mode == TWO else three_way_allocations(5)
            for samples in self.run(asked, schedules, request, progress):
                yield self.show(samples, asked, schedules, schedule, mode)
            return
        yield AS_BEFORE  # stopped

    def sample_opening(
        self, samples: list[Sample], mode: str, ratio: float, s: float, b: float, l: float, request: gr.Request, progress: gr.Progress = gr.Progress(),  # noqa: B008, E741
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Fill an empty tab with what its controls show, where the weights are bundled; the pictures are sampled once for all users."""
        if samples or not self.backbone.bundled:
            yield AS_BEFORE
            return
        with messages():
            asked, schedule = self.backbone.default, StitchSchedule.from_ratio(RATIO)
            if not self.opening:
                *_, self.opening = self.run(asked, [schedule], request, progress)
            yield self.show(self.opening, asked, [schedule], self.schedule(mode, ratio, s, b, l), mode)
            return
        yield AS_BEFORE  # stopped

    def run(self, asked: Request, schedules: Sequence[StitchSchedule], request: gr.Request, progress: gr.Progress) -> Iterator[list[Sample]]:
        """Sample as a run of this user, who sees how far it is and can stop it."""
        asked.check(self.backbone)
        with self.jobs.run((request.session_hash, self.backbone.title)) as stopped:
            told = (-1.0, "")

            def watch(share: float, words: str) -> None:
                nonlocal told
                self.jobs.check(stopped)
                now = time.monotonic()
                if words != told[1] or now - told[0] > 0.2:  # a browser cannot draw every step of a tiny model
                    told = (now, words)
                    progress(share, desc=words)

            yield from self.backbone.sample(asked, schedules, watch)

    def show(self, samples: list[Sample], asked: Request, schedules: Sequence[StitchSchedule], chosen: StitchSchedule, mode: str) -> list[Any]:
        """Values of all outputs: the chosen schedule, or the last that is ready, beside the large model alone, and all of several."""
        name = chosen.describe(self.letters(mode))
        found = next((sample for sample in samples if sample.name == name), samples[-1])
        several = len(schedules) > 1  # a gallery of an earlier run would lead to pictures that are gone
        gallery = gr.update(value=[(sample.sheet, caption(sample, mode)) for sample in samples] if several else [], visible=several)
        pictures = [headline(found, samples[0]), (samples[0].sheet, found.sheet), curve(samples, self.known[mode], name)]
        return [samples, *pictures, gallery, self.backbone.command(asked, schedules)]

    def stop_run(self, request: gr.Request) -> None:
        """Stop the user's run; one that still waits in the queue is taken out of it by gradio."""
        stopped = self.jobs.stop((request.session_hash, self.backbone.title))
        gr.Info("Stopped." if stopped else "Nothing is running here.", duration=3)


def caption(sample: Sample, mode: str) -> str:
    """A schedule in the gallery: its ratio or its shares in percent, and its speed."""
    shares = f"{sample.schedule.fractions[0]:g}" if mode == TWO else "/".join(f"{100 * f:.0f}" for f in sample.schedule.fractions)
    return f"{shares} · {sample.speed_up:.2f}x"
