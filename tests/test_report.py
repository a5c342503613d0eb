"""`diffkit report`: what the page says, that it needs nothing else, and that it works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, call_diffkit
from diffkit.engine.store import Store
from diffkit.errors import ExitCode
from diffkit.measure.report import read_records

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


class Page(HTMLParser):
    """Elements by tag, and all text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: dict[str, list[dict[str, str | None]]] = {}
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.setdefault(tag, []).append(dict(attrs))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in {"script", "style"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def told(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validations, previews and an evaluation, made by the command line."""
    cache = tmp_path_factory.mktemp("cache")
    run = tmp_path_factory.mktemp("runs") / "roses & <lilies>"
    options = ("--steps", 12, "--validate-every", 16, "--preview-every", 24, *TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        for command in (("train", dataset, "-o", run, *options), ("evaluate", run, "-n", 24, "--steps", 2)):
            done = call_diffkit(*command)
            assert done.returncode == 0, done.stderr
    done = call_diffkit("report", run)
    assert done.returncode == 0, done.stderr
    return run


def test_the_page_says_what_the_records_say(told: Path, dataset: Path) -> None:
    text = (told / "report.html").read_text()
    page = Page(text)
    records = [json.loads(line) for line in (told / "metrics.jsonl").read_text().splitlines()]
    best = min((each for each in records if "holdout_loss" in each), key=lambda each: each["holdout_loss"])
    assert "roses & <lilies>" in page.text
    assert f"{best['holdout_loss']:.4f}" in page.text
    assert f"best, at {best['images']:,} images" in page.text
    (evaluation,) = [json.loads(line) for line in (told / "evaluations.jsonl").read_text().splitlines()]
    for each in evaluation["metrics"]:
        assert f"{each['value']:.4g}" in page.text
    assert "12x12x3, 2 classes" in page.text
    assert f"{Store.open(dataset).count} to train on" in page.text
    assert "diffkit train" in page.text
    assert "[scheduler]" in page.text
    assert len(page.elements["svg"]) >= 8
    previews = [each for each in records if "picture" in each]
    assert page.elements["input"][0]["max"] == str(len(previews) - 1)
    assert len(re.findall(r"images: \d+, uri:", text)) == len(previews)


def test_the_page_loads_nothing_from_anywhere_and_escapes_what_is_not_its_own(told: Path) -> None:
    text = (told / "report.html").read_text()
    page = Page(text)
    links = [
        value
        for elements in page.elements.values()
        for element in elements
        for key, value in element.items()
        if key in {"src", "href", "xlink:href"}
    ]
    assert links
    assert all(value and (value.startswith(("data:", "#"))) for value in links)
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert "lilies" not in page.elements
    assert all(image.get("alt") for image in page.elements["img"])
    assert len(text) < 2_000_000


def test_a_report_is_made_again_but_nothing_else_is_replaced(told: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert call_diffkit("report", told, "-o", page, "--no-trajectory").returncode == 0
    assert "From noise to image" not in page.read_text()
    assert call_diffkit("report", told, "-o", page).returncode == 0
    page.write_text("<html>my own page</html>")
    done = call_diffkit("report", told, "-o", page)
    assert done.returncode == ExitCode.USAGE
    assert "is not a report" in done.stderr
    assert page.read_text() == "<html>my own page</html>"


def test_a_run_that_has_only_begun_has_a_report_too(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.toml", tmp_path / "run" / "config.toml")
    done = call_diffkit("report", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "noise schedule" in page.text
    assert "svg" not in page.elements


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = call_diffkit("report", tmp_path)
    assert done.returncode == ExitCode.MODEL
    assert "is not a run" in done.stderr


def test_long_records_are_thinned_and_keep_their_means(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).random(200_000)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses):
            file.write(f'{{"images": {step * 8}, "step": {step}, "loss": {loss}, "lr": 0.001}}\n')
        file.write('{"images": 1600000, "loss"')  # cut off
    begun = time.monotonic()
    records = read_records(tmp_path)
    assert time.monotonic() - begun < 20
    assert len(records.steps["loss"]) == 500
    assert records.steps["loss"].mean() == pytest.approx(losses.mean())
    assert records.steps["loss"][0] == pytest.approx(losses[:400].mean())


def test_many_previews_are_thinned_and_older_runs_show_theirs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    for number in range(100):
        picture = Image.new("RGB", (8, 8), (number, 0, 0))
        picture.save(tmp_path / "run" / "samples" / f"images-{number * 1000:012d}.png")
    assert call_diffkit("report", tmp_path / "run", "--no-trajectory").returncode == 0
    text = (tmp_path / "run" / "report.html").read_text()
    shown = [int(each) for each in re.findall(r"images: (\d+), uri:", text)]
    assert len(shown) == 40
    assert (shown[0], shown[-1]) == (0, 99_000)
    assert "pictures in between are left out" in text


@pytest.fixture
def browser(tmp_path: Path) -> Any:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("no Chromium here")
    selenium = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def test_the_report_works_in_a_browser(told: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get((told / "report.html").resolve().as_uri())
    grid, seen = browser.find_element(By.ID, "grid"), browser.find_element(By.ID, "seen")
    last = grid.get_attribute("src")
    assert seen.text == "96 images"
    slider = browser.find_element(By.ID, "frame")
    slider.send_keys(Keys.HOME)
    assert seen.text == "24 images"
    assert grid.get_attribute("src") != last
    assert browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", grid)
    for section in ("samples", "charts", "trajectory", "nearest", "evaluations", "reproduce"):
        assert browser.find_element(By.ID, section).size["height"] > 50
    for drawing in browser.find_elements(By.CSS_SELECTOR, ".charts svg"):
        assert drawing.size["height"] > 100
    for width in (400, 1400):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [each for each in browser.get_log("browser") if each["level"] in {"SEVERE", "WARNING"}] == []
