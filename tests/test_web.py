"""The web page: what it draws and refuses, and how it behaves in a Chromium (marked web; skipped where none is installed)."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import urlopen

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from sd_tiny import tiny_sd, tiny_unet
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from dit import sample_t_stitch as dit_script
from ldm.scripts import sample_imagenet_32_t_stitch as ldm_script
from sd import gradio_demo
from sd.page.classes import EVERY_CLASS, class_backbones
from sd.page.drawings import Point, front, steps_strip, tradeoff, triangle
from sd.page.jobs import Jobs, Stopped, messages
from sd.page.page import CSS, build_page, theme
from sd.page.prompts import PromptBackbone, prompt_backbones
from sd.page.request import Backbone, Request, Sample, Watch
from sd.page.tab import others
from sd.tstitch_sd_utils import stitch
from sit import sample_t_stitch as sit_script
from tstitch.cli import run
from tstitch.errors import InputError
from tstitch.schedule import StitchSchedule, two_way_ratios

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
PATIENCE = 120  # seconds; a busy machine is slow


def in_chromium(test: Callable) -> Callable:
    """Mark a test that drives a browser."""
    return pytest.mark.web(pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver here; make test-web installs them")(test))


def quick(backbone: Backbone) -> Backbone:
    """The backbone, opening with one picture."""
    return replace(backbone, count=1)


def tiny_prompts() -> PromptBackbone:
    """A tab of prompts whose models are tiny and random, but stitched and called as the real ones."""
    emoji = prompt_backbones("cpu", None)[0]
    return replace(
        emoji,
        title="Tiny SD",
        build=lambda large, small: stitch(tiny_sd(), tiny_unet(1, width=8)),
        bundled=False,
        large=["."],
        small=["."],
        num_steps=4,
        count=2,
    )


def ask(**values: object) -> Request:
    return replace(quick(class_backbones("cpu", "fp32")[0]).default, **values)


def ignore(share: float, words: str) -> None:
    pass


# -- without a browser


@pytest.mark.parametrize("moved", range(3))
def test_moving_one_share_keeps_it_and_the_sum(moved: int) -> None:
    for start in ((0.2, 0.2, 0.6), (1.0, 0.0, 0.0), (0.0, 0.35, 0.65)):
        for value in (0.0, 0.05, 0.35, 0.8, 1.0):
            shares = list(start)
            shares[moved] = value
            after = others(shares, moved)
            assert after[moved] == value and sum(after) == pytest.approx(1, abs=1e-9) and min(after) >= 0
            StitchSchedule(after)
    assert others([0.4, 0.2, 0.6], 0) == [0.4, 0.15, 0.45]  # base and large keep 1 : 3


def test_the_strip_has_every_step_once_in_order() -> None:
    for ratio in (0.0, 0.37, 1.0):
        legs = re.findall(r">(\d+) (small|large)<", steps_strip(StitchSchedule.from_ratio(ratio), ["S", "L"], 20))
        counts = {word: int(count) for count, word in legs}
        assert counts.get("small", 0) == int(20 * ratio + 1e-6) and sum(counts.values()) == 20
        assert [word for _, word in legs] == sorted(counts, reverse=True)


def test_the_curve_goes_through_the_points_that_no_other_beats() -> None:
    points = [Point("a", 1.0, 3.0), Point("b", 1.2, 2.5), Point("c", 1.4, 3.0), Point("d", 1.3, 3.5)]
    assert [p.name for p in front(points)] == ["b", "c"]
    drawn = ET.fromstring(tradeoff(points, "c", "<loss>", "here & now"))
    circles = list(drawn.iter("circle"))
    assert len(circles) == 4 and circles[-1].get("class") == "dot chosen" and circles[-1].find("title").text.startswith("c: 1.40")
    ET.fromstring(tradeoff(points[:1], "x", "loss", ""))  # one point has no extent
    ET.fromstring(triangle((0.2, 0.2, 0.6)))


def test_errors_are_sentences_and_defects_go_to_the_log(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(gr.Error) as bad, messages():
        raise InputError("write <b>")
    assert bad.value.message == "write &lt;b&gt;" and not bad.value.print_exception and not capsys.readouterr().err
    with pytest.raises(gr.Error) as defect, messages():
        raise RuntimeError("secret place")
    assert "secret" not in defect.value.message and "Traceback" in capsys.readouterr().err
    with messages():
        raise Stopped


def test_a_run_stops_alone_and_an_older_one_of_its_owner_stops_too() -> None:
    jobs = Jobs()
    with jobs.run(("ann", "DiT")) as ann, jobs.run(("bob", "DiT")) as bob:
        assert jobs.stop(("ann", "DiT")) and ann.is_set() and not bob.is_set()
        with jobs.run(("bob", "DiT")) as newer:
            assert bob.is_set() and not newer.is_set()
            jobs.stop_all("bob")
            assert newer.is_set()
    assert not jobs.stop(("ann", "DiT"))


BAD_REQUESTS = {
    "no seed": ({"seed": None}, "seed must lie in 0..4294967295; type a number"),
    "negative seed": ({"seed": -1}, "seed must lie in"),
    "no steps": ({"num_steps": 1}, "steps must lie in 2..100, got 1"),
    "too many steps": ({"num_steps": 101}, "steps must lie in 2..100"),
    "no pictures": ({"count": 0}, "pictures must lie in 1..16"),
    "guidance": ({"guidance": float("nan")}, "guidance must lie in 1..10, got nan"),
    "empty prompt": ({"subject": "  "}, "the prompt is empty"),
    "no prompt": ({"subject": None}, "the prompt is empty"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_get_one_sentence(case: str) -> None:
    values, says = BAD_REQUESTS[case]
    with pytest.raises(InputError, match=re.escape(says)):
        ask(**values).check(class_backbones("cpu", "fp32")[0])


def test_the_command_of_every_tab_is_one_that_its_script_takes() -> None:
    scripts = {"dit/sample_t_stitch.py": dit_script, "sit/sample_t_stitch.py": sit_script, "ldm/scripts/sample_imagenet_32_t_stitch.py": ldm_script}
    checked = 0
    for backbone in class_backbones("cpu", "fp32"):
        for method in backbone.methods:
            three = [[StitchSchedule((0.2, 0.2, 0.6))]] if len(backbone.letters) == 3 else []
            for schedules in ([StitchSchedule.from_ratio(0.4)], two_way_ratios(), *three):
                _, script, *arguments = shlex.split(backbone.command(replace(backbone.default, method=method), schedules))
                scripts[script].parse_args(arguments)
                checked += 1
    assert checked >= 15


def test_a_prompt_is_sampled_ratio_by_ratio_from_the_same_noise_and_can_be_stopped() -> None:
    backbone = tiny_prompts()
    request = replace(backbone.default, subject="red heart")
    seen = []
    stages = list(backbone.sample(request, two_way_ratios(4), lambda share, words: seen.append(share)))
    assert [len(samples) for samples in stages] == [1, 2, 3, 4, 5] and seen[-1] == 1 and seen == sorted(seen)
    assert [sample.name for sample in stages[-1]] == ["L:100", "S:25 L:75", "S:50 L:50", "S:75 L:25", "S:100"]
    assert stages[-1][0].difference == 0 < stages[-1][4].difference
    ((again, *_),) = [list(backbone.sample(request, [StitchSchedule.from_ratio(0.0)], ignore))[-1:][0]]
    assert np.array_equal(np.asarray(again.sheet), np.asarray(stages[-1][0].sheet))

    def stop(share: float, words: str) -> None:
        if share > 0.3:
            raise Stopped

    with pytest.raises(Stopped):
        list(backbone.sample(request, two_way_ratios(4), stop))
    assert len(list(backbone.sample(request, [StitchSchedule.from_ratio(1.0)], ignore))[-1]) == 2  # the pipeline serves the next


def test_models_that_are_not_here_are_named_with_what_to_do() -> None:
    for backbone in prompt_backbones("cpu", None)[1:]:
        note = backbone.note(replace(backbone.default, large="nobody/nothing"))
        assert "nobody/nothing" in note and "`pretrained_models/nobody/nothing`" in note and "Generate fetches" in note
        assert backbone.available()


def test_the_flags_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **words: launched.update(words, queue=self._queue))
    gradio_demo.main(["--port", "7999", "--host", "0.0.0.0", "--share", "--auth", "ann:a:b", "--auth", "bob:c", "--concurrency", "3", "--device", "cpu"])
    assert (launched["server_port"], launched["server_name"], launched["share"]) == (7999, "0.0.0.0", True)
    assert launched["auth"] == [("ann", "a:b"), ("bob", "c")]
    assert launched["queue"].max_size == 64


@pytest.mark.parametrize("arguments", [["--auth", "ann"], ["--auth", ":secret"], ["--device", "cuda:99"], ["--port", "0"], ["--prot", "1"]])
def test_bad_flags_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(lambda: gradio_demo.main(arguments))
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


# -- in a browser


@dataclass(frozen=True)
class Broken:
    """A backbone with a defect, and one that waits until it is stopped."""

    inner: Backbone
    title: str = "Broken"
    bundled: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def sample(self, request: Request, schedules: Sequence[StitchSchedule], watch: Watch) -> Iterator[list[Sample]]:
        if request.seed == 13:
            raise RuntimeError("a defect with a secret")
        try:
            for share in range(10_000):
                watch(share / 10_000, "waiting to be stopped")
                time.sleep(0.01)
        except Stopped:
            self.stopped.set()
            raise
        yield []


@pytest.fixture(scope="module")
def broken() -> Broken:
    return Broken(class_backbones("cpu", "fp32")[1])


@pytest.fixture(scope="module")
def address(broken: Broken) -> Iterator[str]:
    missing = replace(prompt_backbones("cpu", None)[1], build=lambda large, small: (_ for _ in ()).throw(InputError("no such model; copy it here")))
    page = build_page([*map(quick, class_backbones("cpu", "fp32")), tiny_prompts(), missing, broken], concurrency=2)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=theme(), css_paths=[CSS])
    yield url
    page.close()


class Browser:
    """A user in front of the page."""

    def __init__(self, url: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000", "--disable-background-networking"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.get(url)
        self.until(lambda: self.all(".generate"))

    def until(self, condition: Callable[[], object]) -> object:
        """Wait for a condition to hold; what is drawn anew meanwhile is looked at again."""
        return WebDriverWait(self.driver, PATIENCE, 0.1, [StaleElementReferenceException]).until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        """Elements that can be seen."""
        return [element for element in self.driver.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]

    def the(self, selector: str) -> WebElement:
        """The element that can be seen."""
        return self.until(lambda: self.all(selector))[0]

    def click(self, selector: str) -> None:
        element = self.the(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)

    def tab(self, name: str) -> None:
        next(button for button in self.driver.find_elements(By.CSS_SELECTOR, "button[role=tab]") if button.text == name).click()
        self.until(lambda: self.all(".generate"))

    def type(self, selector: str, text: str) -> None:
        element = self.the(selector)
        element.send_keys(Keys.CONTROL, "a")
        element.send_keys(text or Keys.BACKSPACE, Keys.TAB)

    def headline(self) -> str:
        return self.the(".headline").text

    def pictures(self) -> list[str]:
        """Addresses of the two pictures side by side, of which there are none at first."""
        return [image.get_attribute("src") for image in self.all(".compare img")]

    def opened(self) -> None:
        """Wait for the pictures that the tab opens with, then make the runs to come short."""
        self.until(lambda: len(self.pictures()) == 2)
        self.type(".steps input", "4")

    def generate(self, button: str = ".generate") -> list[str]:
        """Press a button, wait for other pictures than before; the two sides change one after the other, so until they rest."""
        before = self.pictures()
        self.click(button)

        def rested() -> list[str] | bool:
            now = self.pictures()
            if now == before or len(now) != 2:
                return False
            time.sleep(1)
            return self.pictures() == now and now

        return self.until(rested)

    def message(self) -> str:
        """The text of a message that has just come up; it is closed."""
        text = self.until(lambda: [toast.text for toast in self.all(".toast-body")])[0]
        for close in self.all(".toast-close"):
            self.driver.execute_script("arguments[0].click()", close)
        self.until(lambda: not self.all(".toast-body"))
        return text

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.driver.quit()


@pytest.fixture
def browser(address: str) -> Iterator[Browser]:
    with Browser(address) as opened:
        yield opened


def read(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(urlopen(url).read())).convert("RGB")).astype(int)


@in_chromium
def test_the_page_opens_offline_with_a_picture_and_without_a_complaint(browser: Browser) -> None:
    assert [tab.text for tab in browser.all("button[role=tab]")] == ["DiT emoji", "SiT emoji", "LDM emoji", "Tiny SD", "Stable Diffusion", "Broken"]
    browser.until(lambda: len(browser.pictures()) == 2)
    assert browser.headline().startswith("S:40 L:60")
    assert len(browser.all(".plot .dot")) == 11 and len(browser.all(".plot .dot.chosen")) == 1
    places = browser.driver.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).hostname)")
    assert len(places) > 10 and set(places) == {"127.0.0.1"}
    assert not [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert browser.driver.execute_script("return getComputedStyle(document.querySelector('.compare img')).imageRendering") == "pixelated"
    assert browser.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@in_chromium
def test_the_pictures_are_those_of_the_command_that_the_page_shows(browser: Browser, tmp_path: Path) -> None:
    browser.opened()
    browser.type(".seed input", "7")
    stitched = read(browser.generate()[1])
    next(label for label in browser.all("button.label-wrap") if "terminal" in label.text).click()
    command = browser.the(".command textarea").get_attribute("value")
    _, script, *arguments = shlex.split(command)
    assert script == "dit/sample_t_stitch.py" and "7" in arguments
    dit_script.main([*arguments, "--device", "cpu", "--save_dir", str(tmp_path)])
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    ours = stitched[8 : 8 + 512 : 8, 4 : 4 + 512 : 8]  # enlarged eight times, in a margin
    (size,) = {ours.shape[0], ours.shape[1]}
    theirs = grid[-size - 4 : -4, 4 : 4 + size]
    assert ours.std() > 10 and np.abs(ours - theirs).max() <= 1


@in_chromium
@pytest.mark.parametrize("tab", ["SiT emoji", "Tiny SD"])
def test_generate_works_on_every_tab_that_needs_no_network(browser: Browser, tab: str) -> None:
    browser.tab(tab)
    if tab == "SiT emoji":
        browser.until(lambda: len(browser.pictures()) == 2)
        assert len(browser.all(".plot .dot")) == 11
        browser.opened()
    browser.type(".seed input", "5")
    large, stitched = map(read, browser.generate())
    assert large.shape == stitched.shape and large.std() > 5 and not np.array_equal(large, stitched)
    assert "times as fast as large alone" in browser.headline()


@in_chromium
def test_all_ratios_fill_a_gallery_that_can_be_compared_and_a_curve_that_follows_the_slider(browser: Browser) -> None:
    browser.opened()
    browser.type(".seed input", "3")
    browser.click(".sweep")
    tiles = browser.until(lambda: len(found := browser.all(".sheets .thumbnail-item")) == 11 and found)
    assert [tile.text.split(" ")[0] for tile in tiles] == [f"{k / 10:g}" for k in range(11)]
    browser.until(lambda: "this run" in browser.the(".plot .source").text)
    tiles[10].click()
    browser.until(lambda: browser.headline().startswith("S:100 "))
    assert browser.the(".ratio input[type=number]").get_attribute("value") == "1"
    browser.until(lambda: browser.the(".strip").text.startswith("4 small"))
    marked = browser.the(".plot .dot.chosen").get_attribute("cx")
    browser.type(".ratio input[type=number]", "0")
    browser.until(lambda: browser.headline().startswith("L:100 "))
    browser.until(lambda: browser.the(".plot .dot.chosen").get_attribute("cx") != marked)
    assert len(set(browser.pictures())) == 1  # the large model beside itself


@in_chromium
def test_three_shares_sum_to_one_and_are_sampled(browser: Browser) -> None:
    browser.opened()
    browser.driver.execute_script("arguments[0].click()", browser.all(".mode input")[1])
    browser.type(".share-base input[type=number]", "0.5")

    def shares() -> list[float]:
        return [float(browser.the(f".share-{word} input[type=number]").get_attribute("value")) for word in ("small", "base", "large")]

    browser.until(lambda: shares() == [0.1, 0.5, 0.4])  # small and large keep 1 : 3 on a grid of 0.05
    browser.until(lambda: "base 50%" in browser.the(".triangle").text)
    browser.type(".steps input", "10")
    browser.until(lambda: re.search(r"1 small\s+5 base\s+4 large", browser.the(".strip").text))
    browser.generate()
    browser.until(lambda: browser.headline().startswith("S:10 B:50 L:40"))


@in_chromium
def test_stop_ends_the_run_on_the_server_and_the_next_one_works(browser: Browser, broken: Broken) -> None:
    browser.tab("Broken")
    broken.stopped.clear()
    browser.click(".generate")
    browser.until(lambda: "waiting to be stopped" in browser.the(".compare").text)
    browser.click(".stop")
    assert "Stopped" in browser.message()
    assert broken.stopped.wait(PATIENCE)
    browser.until(lambda: "waiting" not in browser.the(".compare").text)
    assert not browser.all(".toast-body") and browser.headline() == broken.sentence  # what was shown stays
    browser.click(".stop")
    assert "Nothing is running" in browser.message()
    browser.tab("DiT emoji")
    browser.opened()
    browser.type(".seed input", "21")
    browser.generate()


@in_chromium
def test_a_user_who_leaves_stops_the_run(address: str, broken: Broken) -> None:
    broken.stopped.clear()
    with Browser(address) as browser:
        browser.tab("Broken")
        browser.click(".generate")
        browser.until(lambda: "waiting to be stopped" in browser.the(".compare").text)
    assert broken.stopped.wait(PATIENCE)


@in_chromium
def test_bad_input_is_answered_with_a_message_that_says_what_to_do(browser: Browser) -> None:
    browser.type(".steps input", "1000")
    browser.click(".generate")
    assert "the number of steps must lie in 2..100, got 1000" in browser.message()
    browser.type(".steps input", "")
    browser.click(".generate")
    assert "type a number" in browser.message()
    browser.tab("Tiny SD")
    browser.type(".subject textarea", "")
    browser.click(".generate")
    assert "the prompt is empty; write what the picture shall show" in browser.message()
    browser.tab("Stable Diffusion")
    assert "pretrained_models/" in browser.the(".note").text
    browser.click(".generate")
    assert "no such model; copy it here" in browser.message()
    browser.tab("Broken")
    browser.type(".seed input", "13")
    browser.click(".generate")
    said = browser.message()
    assert "RuntimeError; the server's log says more" in said and "secret" not in said and "Traceback" not in browser.driver.page_source


@in_chromium
def test_two_users_at_once_get_their_own_pictures(address: str) -> None:
    with Browser(address) as ann, Browser(address) as bob:
        for user in (ann, bob):
            user.opened()
        opening = ann.pictures()
        ann.type(".seed input", "31")
        bob.type(".seed input", "32")
        ann.click(".generate")
        bob.click(".generate")
        shown = {}
        for name, user in (("ann", ann), ("bob", bob)):
            shown[name] = read(user.until(lambda user=user: (now := user.pictures()) and now != opening and len(now) == 2 and now)[1])
    dit = quick(class_backbones("cpu", "fp32")[0])
    for name, seed in (("ann", 31), ("bob", 32)):
        ((_, alone),) = dit.sample(replace(dit.default, seed=seed, num_steps=4), [StitchSchedule.from_ratio(0.4)], ignore)
        assert np.abs(np.asarray(alone.sheet).astype(int) - shown[name]).max() <= 1
    assert np.abs(shown["ann"] - shown["bob"]).max() > 50


@in_chromium
def test_an_example_fills_the_controls(browser: Browser) -> None:
    next(chip for chip in browser.all(".gallery-item") if EVERY_CLASS in chip.text).click()
    browser.until(lambda: browser.the(".subject input").get_attribute("value") == EVERY_CLASS)
