"""The web page as a person meets it, in Chromium."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def browsing(server: Harness, *, phone: bool = False) -> Iterator[Page]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        size = {"width": 390, "height": 800} if phone else {"width": 780, "height": 900}
        page = browser.new_page(viewport=size, has_touch=phone, is_mobile=phone)  # type: ignore[arg-type]
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/")
        yield page
        browser.close()
        # A broken content security policy or a missing asset shows here, and nowhere else.
        assert [text for text in complaints if not re.search("401|415", text)] == []


@pytest.fixture
def page(server: Harness) -> Iterator[Page]:
    with browsing(server) as page:
        yield page


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


def test_several_photos_stay_in_their_order_and_the_newest_are_on_top(page: Page, tmp_path: Path) -> None:
    first, second, third = (str(picture(tmp_path, red)) for red in (1, 2, 3))
    page.set_input_files("input[type=file]", [first])
    page.locator(".bars").nth(0).wait_for()
    page.set_input_files("input[type=file]", [second, third])
    page.locator(".bars").nth(2).wait_for()
    assert page.locator("figcaption").all_inner_texts() == ["red2.png", "red3.png", "red1.png"]


def test_the_same_photo_can_be_chosen_again(page: Page, tmp_path: Path) -> None:
    photo = str(picture(tmp_path, 4))
    for times in (1, 2):
        page.set_input_files("input[type=file]", photo)
        page.locator(".bars").nth(times - 1).wait_for(timeout=5000)


def test_a_folder_is_not_taken_for_a_server_that_is_gone(page: Page) -> None:
    # What Chromium makes of a dropped folder: a file of which nothing can be read.
    page.evaluate(
        """() => {
            const folder = new File([], "photos");
            folder.slice = () => ({ arrayBuffer: () => Promise.reject(new DOMException("", "NotFoundError")) });
            const drop = new Event("drop");
            drop.dataTransfer = { files: [folder] };
            window.dispatchEvent(drop);
        }"""
    )
    page.locator(".answer .error").wait_for()
    assert "this is a folder" in page.locator(".answer").inner_text()


def test_a_page_of_something_in_between_is_no_riddle(page: Page, tmp_path: Path) -> None:
    page.route(
        "**/v1/classify",
        lambda route: route.fulfill(status=200, content_type="text/html", body="<p>Please log in</p>"),
    )
    page.set_input_files("input[type=file]", str(picture(tmp_path, 5)))
    page.locator(".answer .error").wait_for()
    assert "the answer is no JSON (status 200)" in page.locator(".answer").inner_text()


def contrast(page: Page, selector: str, of: str = "color") -> float:
    """Of an element's text or border with what is behind it, by WCAG 2.2's definition."""
    script = """([selector, of]) => {
        const luminance = (colour) => {
            const linear = colour.match(/[\\d.]+/g).slice(0, 3)
                .map((value) => value / 255)
                .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const element = document.querySelector(selector);
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        const pair = [getComputedStyle(element)[of], getComputedStyle(behind).backgroundColor].map(luminance);
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }"""
    return float(page.evaluate(script, [selector, of]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_focus_can_be_seen(page: Page, server: Harness, tmp_path: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page.set_input_files("input[type=file]", str(picture(tmp_path, 9)))
    page.locator(".bars").wait_for()
    for selector in ("header p", "#drop span", ".answer .quiet", ".share", "figcaption", "footer"):
        assert contrast(page, selector) >= 4.5, selector
    page.focus("#file")
    page.wait_for_timeout(300)  # the border's colour changes within 0.15 s
    assert contrast(page, "#drop", "borderTopColor") >= 3
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    page.locator(".route b").first.wait_for()
    assert contrast(page, ".route b") >= 4.5


def test_a_bar_is_named_after_its_label(page: Page, tmp_path: Path) -> None:
    page.set_input_files("input[type=file]", str(picture(tmp_path, 9)))
    page.locator(".bars").wait_for()
    labels = page.locator(".label").all_inner_texts()
    assert len(labels) == 5
    for label in labels:
        assert page.get_by_role("meter", name=label, exact=True).count() == 1


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_text_that_is_dropped_or_pasted_is_answered(page: Page, tmp_path: Path, event: str) -> None:
    page.evaluate(
        """(name) => {
            const event = new Event(name, { bubbles: true });
            event.dataTransfer = event.clipboardData = { files: [] };
            document.body.dispatchEvent(event);
        }""",
        event,
    )
    message = page.locator("#message")
    assert "no photo" in message.inner_text()
    page.set_input_files("input[type=file]", str(picture(tmp_path, 9)))
    page.locator(".bars").wait_for()
    assert message.inner_text() == ""


def test_what_the_page_says_is_not_wiped_when_the_models_arrive(page: Page) -> None:
    with page.expect_response("**/v1/models") as models:
        page.evaluate(
            """() => {
                document.querySelector("#key").dispatchEvent(new Event("change"));
                const event = new Event("drop", { bubbles: true });
                event.dataTransfer = { files: [] };
                document.body.dispatchEvent(event);
            }"""
        )
    models.value.finished()
    page.wait_for_load_state("networkidle")
    assert "no photo" in page.locator("#message").inner_text()


def test_a_phone_is_not_told_to_drop_or_click(server: Harness) -> None:
    with browsing(server, phone=True) as page:
        text = page.locator("#drop").inner_text()
        assert "Choose a photo" in text
        assert not re.search("drop|click|paste", text, re.IGNORECASE)


def test_a_key_is_asked_for_and_a_wrong_one_is_said_to_be(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{hashlib.sha256(b'right').hexdigest()} alice\n")
    with serving(api_keys=keys) as server, browsing(server) as page:
        key, message = page.locator("#key"), page.locator("#message")
        key.wait_for()
        assert message.inner_text() == ""
        key.fill("wrong")
        key.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        page.set_input_files("input[type=file]", str(picture(tmp_path, 9)))
        page.locator(".answer .error").wait_for()
        assert page.locator(".answer").inner_text() == "The server does not know this key."
        key.fill("right")
        key.press("Enter")
        page.locator("#model", has_text="classes").wait_for()
        assert message.inner_text() == ""


def test_the_pages_own_curl_line_works(page: Page, server: Harness) -> None:
    assert (
        page.locator("#curl").inner_text() == f"curl -T photo.jpg http://127.0.0.1:{server.port}/v1/classify"
    )


def test_the_documentation_lists_the_routes(page: Page, server: Harness) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    page.get_by_text("/v1/classify").first.wait_for()
    assert page.get_by_text("/readyz").count() > 0
