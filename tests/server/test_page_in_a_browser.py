"""The web page as a person meets it, in Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from tests.server.harness import Harness, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no Chromium on this machine (Debian's package chromium)"
    ),
]


@pytest.fixture
def server() -> Iterator[Harness]:
    with serving() as harness:
        yield harness


@pytest.fixture
def page(server: Harness) -> Iterator[Page]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 780, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/")
        yield page
        browser.close()
        # A broken content security policy or a missing asset shows here, and nowhere else.
        assert [text for text in complaints if "415" not in text] == []


def picture(folder: Path, red: int) -> Path:
    path = folder / f"red{red}.png"
    Image.new("RGB", (64, 48), (red, 0, 0)).save(path)
    return path


def test_a_photo_gets_five_labels_with_bars_inside_its_card(page: Page, tmp_path: Path) -> None:
    page.set_input_files("input[type=file]", str(picture(tmp_path, 17)))
    bars = page.locator(".bars li")
    bars.nth(4).wait_for()
    assert bars.count() == 5
    assert "64 \N{MULTIPLICATION SIGN} 48" in page.locator(".answer").inner_text()
    card, track = page.locator(".answer").bounding_box(), page.locator(".meter").first.bounding_box()
    assert card is not None
    assert track is not None
    assert track["x"] + track["width"] <= card["x"] + card["width"] + 1
    fill = page.locator(".meter div").first.bounding_box()
    assert fill is not None
    assert (fill["y"], fill["height"]) == (track["y"], track["height"])
    assert abs(fill["width"] - 0.5 * track["width"]) <= 1  # the fake engine's probability is a half
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    first, last = (
        float(page.locator(".meter").nth(i).get_attribute("aria-valuenow") or "nan") for i in (0, 4)
    )
    assert 0 <= last <= first <= 1


def test_what_is_no_photo_gets_the_servers_sentence(page: Page, tmp_path: Path) -> None:
    notes = tmp_path / "notes.png"
    notes.write_text("not a picture")
    page.set_input_files("input[type=file]", str(notes))
    page.locator(".answer .error").wait_for()
    assert "not an image of an allowed format" in page.locator(".answer").inner_text()


def test_the_pages_own_curl_line_works(page: Page, server: Harness) -> None:
    assert (
        page.locator("#curl").inner_text() == f"curl -T photo.jpg http://127.0.0.1:{server.port}/v1/classify"
    )


def test_the_documentation_lists_the_routes(page: Page, server: Harness) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    page.get_by_text("/v1/classify").first.wait_for()
    assert page.get_by_text("/readyz").count() > 0
