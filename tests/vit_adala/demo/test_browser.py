"""The demo in a real browser: load, pick, click, change the resolution, upload; nothing in the console, no network.

Skipped where Gradio, Playwright or Chromium is missing. On Debian, in an environment of its own (its Pillow is older
than the one of constraints.txt):

    apt-get install chromium && pip install -e ".[dev,demo]" playwright
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from trainers.data.digits import DIGITS_TEACHER

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

SECONDS = 120


@contextlib.contextmanager
def running_demo(folder: Path) -> Iterator[str]:
    """The address of `vit-adala demo` in a process of its own, which leaves nothing when it is stopped."""
    folder.mkdir()
    # analytics and the rest have to be off without the user's variables
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "vit_adala", "demo", str(DIGITS_TEACHER)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            line = demo.stdout.readline()
            found = re.fullmatch(r"demo: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)
            assert found, line + (demo.stderr.read() if not line else "")
            yield found[1]
        finally:
            demo.send_signal(signal.SIGTERM)
            output, errors = demo.communicate(timeout=60)
        assert demo.returncode == 128 + signal.SIGTERM and output == ""
        assert "Traceback" not in errors, errors
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    with running_demo(tmp_path_factory.mktemp("demo") / "tmp") as address:
        yield address


@pytest.fixture
def page(address) -> Iterator:
    """An open page, after whose test nothing may be in the console and nothing may have been asked of another host."""
    problems, requests = [], []
    with playwright.sync_playwright() as player, player.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox"]
    ) as browser:  # fmt: skip
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector(".curves svg")
        yield page
    assert problems == []
    others = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert len(requests) > 20 and others == []


def pictures(page) -> list[str]:
    return [image.get_attribute("src") for image in page.locator(".picture img").all()]


def markers(page) -> int:
    return page.locator(".curves svg use").count()


def wait_for(page, condition: str, argument=None) -> None:
    page.wait_for_function(condition, arg=argument)


def test_pick_click_and_change_the_resolution(page, tmp_path):
    assert page.title() == "vit-adala"
    assert "28 px, 197 tokens" in page.inner_text("#summary")
    first = pictures(page)
    assert len(first) == 4 and all(first)

    page.locator(".gallery-item").nth(2).click()
    wait_for(page, "old => document.querySelectorAll('.picture img')[3].src != old", first[3])
    wait_for(page, "() => !document.querySelector('.note.hint')")
    page.wait_for_timeout(500)
    second, counted = pictures(page), markers(page)
    assert not set(first) & set(second)

    picture = page.locator(".picture img").nth(1)
    box = picture.bounding_box()
    picture.click(position={"x": 0.2 * box["width"], "y": 0.8 * box["height"]})
    wait_for(page, "old => document.querySelectorAll('.picture img')[3].src != old", second[3])
    third = pictures(page)
    assert third[0] == second[0] and third[2] == second[2], "only attention depends on the patch"

    number = page.get_by_label(re.compile("number input for Resolution"))
    number.fill("32")
    number.press("Enter")
    wait_for(page, "() => document.querySelector('#summary').innerText.includes('32 px, 257 tokens')")
    assert markers(page) == counted + 4, "a point more of two models in two figures"
    assert not set(third) & set(pictures(page))
    page.screenshot(path=tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as screenshot:
        assert len(screenshot.convert("RGB").getcolors(maxcolors=10**7)) > 1000


def test_an_upload_that_is_not_an_image_is_a_message_and_the_next_one_is_shown(page, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    Image.effect_noise((50, 40), 80).convert("CMYK").save(tmp_path / "print.jpg")
    for name, expected in (("notes.png", "notes.png cannot be shown"), ("print.jpg", "CMYK, converted to RGB")):
        page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
        page.get_by_text("Pick an example, or upload an image.").wait_for()
        page.locator("#upload input[type=file]").set_input_files(tmp_path / name)
        page.get_by_text(expected).wait_for()
    assert not page.locator(".toast-body").count()
