"""The web page in a Chromium (marked web; skipped where none is installed). test_page.py tests what needs no browser.

One server and one browser serve all tests; every test opens the page anew, which makes it a new user. What the page shows is read in one go by a script, since
an element that was found a moment ago may have been drawn anew.
"""

from __future__ import annotations

import io
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dit import sample_t_stitch as dit_script
from sd.page.classes import EVERY_CLASS, class_backbones
from sd.page.jobs import Stopped
from sd.page.page import CSS, build_page, theme
from sd.page.prompts import prompt_backbones
from sd.page.request import Backbone, Request, Sample, Watch
from sd.page.tab import keep_the_sum
from tstitch.errors import InputError
from tstitch.schedule import StitchSchedule

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
PATIENCE = 120  # seconds; a busy machine is slow
RATIO = ".ratio input[type=number]"

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver here; make test-web installs them"),
]


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
            while True:
                watch(0.5, "waiting to be stopped")
                time.sleep(0.05)
        except Stopped:
            self.stopped.set()
            raise
        yield []


class Browser:
    """A user in front of the page."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000", "--disable-background-networking"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_page_load_timeout(PATIENCE)

    def open(self, url: str) -> None:
        """Open the page as a new user, who waits until it is drawn."""
        self.driver.get(url)
        self.driver.get_log("browser")  # of whoever came before
        self.until(lambda: self.read(".generate"))

    def until(self, condition: Callable[[], object]) -> object:
        """Wait for a condition to hold."""
        return WebDriverWait(self.driver, PATIENCE, 0.1, [StaleElementReferenceException]).until(lambda _: condition())

    def read(self, selector: str, what: str = "innerText") -> list[str]:
        """A property of all elements that can be seen."""
        script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => e[arguments[1]])"
        return self.driver.execute_script(script, selector, what)

    def text(self, selector: str) -> str:
        """The text of the first of them, empty if there is none."""
        return next(iter(self.read(selector)), "")

    def click(self, selector: str, says: str = "") -> None:
        """Click the first element that can be seen and starts with these words."""
        script = """const found = [...document.querySelectorAll(arguments[0])].find(e => e.checkVisibility() && e.innerText.trim().startsWith(arguments[1]));
            found?.click(); return Boolean(found)"""
        self.until(lambda: self.driver.execute_script(script, selector, says))

    def type(self, selector: str, text: str) -> None:
        """Type a text in place of what is there."""

        def typed() -> bool:
            elements = [element for element in self.driver.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]
            if elements:
                elements[0].send_keys(Keys.CONTROL, "a")
                elements[0].send_keys(text or Keys.BACKSPACE, Keys.TAB)
            return bool(elements)

        self.until(typed)
        assert self.read(selector, "value")[0] == text

    def tab(self, name: str) -> None:
        self.click("button[role=tab]", name)
        self.until(lambda: name in self.text("button[role=tab][aria-selected=true]"))
        self.until(lambda: self.read(".generate"))

    def pictures(self) -> list[str]:
        """Addresses of the two pictures side by side, of which there are none at first."""
        return self.read(".compare img", "src")

    def opened(self) -> None:
        """Wait for the pictures that the tab opens with, then make the runs to come short."""
        self.until(lambda: len(self.pictures()) == 2)
        self.type(".steps input", "4")

    def generate(self) -> list[np.ndarray]:
        """Press Generate, after a change that changes both pictures, and wait for them."""
        before = self.pictures()
        self.click(".generate")
        return list(map(picture, self.until(lambda: self.others(before))))

    def others(self, before: Sequence[str]) -> Sequence[str]:
        """The two pictures, once both are other ones than before; for a moment they are one and the same."""
        now = self.pictures()
        return now if len(set(now)) == 2 and not set(now) & set(before) else []

    def message(self) -> str:
        """The text of a message that has just come up; it is closed."""
        text = self.until(lambda: self.text(".toast-body"))
        self.until(lambda: self.driver.execute_script("document.querySelectorAll('.toast-close').forEach(e => e.click())") or not self.read(".toast-body"))
        return text


@pytest.fixture(scope="module")
def broken() -> Broken:
    return Broken(class_backbones("cpu", "fp32")[1])


@pytest.fixture(scope="module")
def address(broken: Broken) -> Iterator[str]:
    def no_network(large: str, small: str) -> None:
        raise InputError("no such model")

    emoji, missing, *_ = prompt_backbones("cpu", None)
    offline = [replace(backbone, count=1) for backbone in (*class_backbones("cpu", "fp32"), emoji)]
    page = build_page([*offline, replace(missing, large=["nobody/nothing"], build=no_network), broken], concurrency=2)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=theme(), css_paths=[CSS])
    yield url
    page.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser, address: str) -> Browser:
    chromium.open(address)
    return chromium


def picture(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(urlopen(url, timeout=PATIENCE).read())).convert("RGB")).astype(int)


def test_the_page_opens_offline_with_a_picture_and_without_a_complaint(browser: Browser) -> None:
    assert browser.read("button[role=tab]") == ["DiT emoji", "SiT emoji", "LDM emoji", "SD emoji", "Stable Diffusion", "Broken"]
    browser.until(lambda: len(browser.pictures()) == 2)
    browser.until(lambda: browser.text(".headline").startswith("S:40 L:60"))
    browser.until(lambda: len(browser.read(".plot .dot")) == 11 and len(browser.read(".plot .dot.chosen")) == 1)
    places = browser.driver.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).hostname)")
    assert len(places) > 10 and set(places) == {"127.0.0.1"}
    assert not [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert browser.driver.execute_script("return getComputedStyle(document.querySelector('.compare img')).imageRendering") == "pixelated"
    assert browser.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_pictures_are_those_of_the_command_that_the_page_shows(browser: Browser, tmp_path: Path) -> None:
    browser.opened()
    browser.type(".seed input", "7")
    stitched = browser.generate()[1]
    browser.click("button.label-wrap", "The same in a terminal")
    command = browser.until(lambda: next(iter(browser.read(".command textarea", "value")), ""))
    _, script, *arguments = shlex.split(command)
    assert script == "dit/sample_t_stitch.py" and "7" in arguments
    dit_script.main([*arguments, "--device", "cpu", "--save_dir", str(tmp_path)])
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    ours = stitched[8 : 8 + 512 : 8, 4 : 4 + 512 : 8]  # enlarged eight times, in a margin
    (size,) = {ours.shape[0], ours.shape[1]}
    theirs = grid[-size - 4 : -4, 4 : 4 + size]
    assert ours.std() > 10 and np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(("tab", "known"), [("DiT emoji", 11), ("SiT emoji", 11), ("LDM emoji", 11), ("SD emoji", 0)])
def test_every_tab_that_needs_no_network_opens_with_pictures_and_generates_others(browser: Browser, tab: str, known: int) -> None:
    browser.tab(tab)
    browser.opened()
    assert len(browser.read(".plot .dot")) == known  # schedules whose quality was measured before
    browser.type(".seed input", "5")
    large, stitched = browser.generate()
    assert large.shape == stitched.shape and large.std() > 5 and not np.array_equal(large, stitched)
    assert browser.text(".headline").startswith("S:40 L:60") and "times as fast as large alone" in browser.text(".headline")


def test_words_decide_what_the_picture_shows(browser: Browser) -> None:
    browser.tab("SD emoji")
    browser.opened()
    browser.type(".steps input", "10")
    colours = {}
    for words in ("red heart", "blue circle"):
        browser.type(".seed input", str(len(words)))  # another picture each time
        browser.type(".subject textarea", words)
        large, _ = browser.generate()
        colours[words] = large[..., 0].mean() - large[..., 2].mean()
    assert colours["red heart"] > colours["blue circle"]


def test_all_ratios_fill_a_gallery_that_can_be_compared_and_a_curve_that_follows_the_slider(browser: Browser) -> None:
    browser.opened()
    browser.type(".seed input", "3")
    browser.click(".sweep")
    browser.until(lambda: [tile.split(" ")[0] for tile in browser.read(".sheets .thumbnail-item")] == [f"{k / 10:g}" for k in range(11)])
    browser.until(lambda: "this run" in browser.text(".plot .source"))
    browser.click(".sheets .thumbnail-item", "1 · ")
    browser.until(lambda: browser.text(".headline").startswith("S:100 "))
    browser.until(lambda: browser.read(RATIO, "value") == ["1"])
    browser.until(lambda: browser.text(".strip").startswith("4 small"))

    def marked() -> list[str]:
        return browser.read(".plot .dot.chosen", "outerHTML")

    there = marked()
    browser.type(RATIO, "0")
    browser.until(lambda: browser.text(".headline").startswith("L:100 "))
    browser.until(lambda: marked() != there)
    browser.until(lambda: len(set(browser.pictures())) == 1)  # the large model beside itself
    browser.type(".seed input", "4")
    browser.click(".generate")
    browser.until(lambda: not browser.read(".sheets .thumbnail-item"))  # they were of the other seed


@pytest.mark.parametrize("moved", range(3))
def test_moving_one_share_keeps_it_and_the_sum(chromium: Browser, moved: int) -> None:
    def others(*shares: float) -> list[float]:
        return chromium.driver.execute_script(f"return ({keep_the_sum(moved)})(...arguments)", *shares)

    for start in ((0.2, 0.2, 0.6), (1.0, 0.0, 0.0), (0.0, 0.35, 0.65)):
        for value in (0.0, 0.05, 0.35, 0.97, 1 / 3, 1.0):
            two = others(*start[:moved], value, *start[moved + 1 :])
            assert sum(two) == pytest.approx(1 - value, abs=1e-6) and min(two) >= 0
            StitchSchedule([*two[:moved], value, *two[moved:]])
    assert others(*[0.2, 0.6][:moved], 0.4, *[0.2, 0.6][moved:]) == [0.15, 0.45]  # they keep 1 : 3
    assert others(*[0.2, 0.6][:moved], 7, *[0.2, 0.6][moved:]) == [0, 0]  # the slider is about to say 1


def test_three_shares_sum_to_one_and_are_sampled(browser: Browser) -> None:
    browser.opened()
    browser.click(".mode label", "Three models")
    browser.type(".share-base input[type=number]", "0.6")
    browser.until(lambda: [browser.read(f".share-{word} input[type=number]", "value") for word in ("small", "base", "large")] == [["0.1"], ["0.6"], ["0.3"]])
    browser.until(lambda: "base 60%" in browser.driver.execute_script("return document.querySelector('.triangle').textContent"))
    browser.type(".steps input", "10")
    browser.until(lambda: browser.read(".strip .leg") == ["1 small", "6 base", "3 large"])
    browser.generate()
    browser.until(lambda: browser.text(".headline").startswith("S:10 B:60 L:30"))


def test_stop_ends_the_run_on_the_server_and_the_next_one_works(browser: Browser, broken: Broken) -> None:
    browser.tab("Broken")
    broken.stopped.clear()
    browser.click(".generate")
    browser.until(lambda: "waiting to be stopped" in browser.text(".compare"))
    browser.click(".stop")
    assert "Stopped" in browser.message()
    assert broken.stopped.wait(PATIENCE)
    browser.until(lambda: "waiting" not in browser.text(".compare"))
    assert not browser.read(".toast-body") and browser.text(".headline") == broken.sentence  # what was shown stays
    browser.until(lambda: browser.click(".stop") or "Nothing is running" in browser.message())
    browser.tab("DiT emoji")
    browser.opened()
    browser.type(".seed input", "21")
    browser.generate()


def test_a_user_who_leaves_stops_the_run(browser: Browser, broken: Broken) -> None:
    broken.stopped.clear()
    browser.tab("Broken")
    browser.click(".generate")
    browser.until(lambda: "waiting to be stopped" in browser.text(".compare"))
    browser.driver.get("about:blank")
    assert broken.stopped.wait(PATIENCE)


def test_bad_input_is_answered_with_a_message_that_says_what_to_do(browser: Browser) -> None:
    browser.until(lambda: len(browser.pictures()) == 2)
    opening = browser.pictures()
    browser.type(".steps input", "1000")
    browser.click(".generate")
    assert "the number of steps must lie in 2..100, got 1000" in browser.message()
    assert browser.pictures() == opening  # what was shown stays
    browser.type(".steps input", "")
    browser.click(".generate")
    assert "type a number" in browser.message()
    browser.tab("SD emoji")
    browser.type(".subject textarea", "")
    browser.click(".generate")
    assert "the prompt is empty; write what the picture shall show" in browser.message()
    browser.tab("Stable Diffusion")
    assert "pretrained_models/nobody/nothing" in browser.text(".note")
    browser.click(".generate")
    said = browser.message()
    assert "could not fetch nobody/nothing" in said and "as the note says" in said
    browser.tab("Broken")
    browser.type(".seed input", "13")
    browser.click(".generate")
    said = browser.message()
    assert "RuntimeError; the server's log says more" in said and "secret" not in said and "Traceback" not in browser.driver.page_source


def test_two_users_at_once_get_their_own_pictures(browser: Browser, address: str) -> None:
    windows = [browser.driver.current_window_handle]
    browser.driver.switch_to.new_window("window")
    windows.append(browser.driver.current_window_handle)
    try:
        browser.open(address)
        shown, opening = {}, {}
        for window, seed in zip(windows, (31, 32), strict=True):
            browser.driver.switch_to.window(window)
            browser.opened()
            browser.type(".seed input", str(seed))
            opening[seed] = browser.pictures()
        for window in windows:  # both run, as the page's two at once allow
            browser.driver.switch_to.window(window)
            browser.click(".generate")
        for window, seed in zip(windows, (31, 32), strict=True):
            browser.driver.switch_to.window(window)
            shown[seed] = picture(browser.until(lambda seed=seed: browser.others(opening[seed]))[1])
    finally:
        browser.driver.switch_to.window(windows[1])
        browser.driver.close()
        browser.driver.switch_to.window(windows[0])
    dit = replace(class_backbones("cpu", "fp32")[0], count=1)
    for seed in (31, 32):
        ((_, alone),) = dit.sample(replace(dit.default, seed=seed, num_steps=4), [StitchSchedule.from_ratio(0.4)], lambda share, words: None)
        assert np.abs(np.asarray(alone.sheet).astype(int) - shown[seed]).max() <= 1
    assert np.abs(shown[31] - shown[32]).max() > 50


def test_an_example_fills_the_controls(browser: Browser) -> None:
    browser.click(".gallery-item", EVERY_CLASS)
    browser.until(lambda: browser.read(".subject input", "value") == [EVERY_CLASS])


@pytest.mark.parametrize(("width", "beside"), [(800, True), (390, False)], ids=["tablet", "telephone"])
def test_a_narrow_window_cuts_nothing_off(browser: Browser, width: int, beside: bool) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": not beside})
    try:
        corners = "return ['.controls', '.results'].map(name => document.querySelector(name).getBoundingClientRect()).map(b => [b.left, b.top, b.right])"
        browser.until(lambda: browser.driver.execute_script("return document.documentElement.scrollWidth") <= width)
        (_, top, right), (left, other_top, end) = browser.driver.execute_script(corners)
        assert end <= width and (left >= right if beside else other_top > top)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
