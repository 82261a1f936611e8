"""The page in a real browser: `pip install 'hovle[app]' playwright`, and Chromium where Debian puts it."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hovle.app.desk import Desk
from hovle.app.models import Models
from hovle.chat import Conversation

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # gradio's own warnings are not ours to heed

CHROMIUM = "/usr/bin/chromium"
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def wait_until(is_done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def desk(folders) -> Desk:
    return Desk(Models(folders, max_new_tokens=12))


@pytest.fixture(scope="module")
def blocks(desk, tmp_path_factory):
    """The page, open."""
    from hovle.app.page import open_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        page = open_page(desk, "127.0.0.1", port)
        yield page
        page.close()


@pytest.fixture(scope="module")
def address(blocks) -> str:
    """Where the page is."""
    return blocks.local_url


@pytest.fixture
def tab(address):
    """The page in a browser; whatever it asks of others than its server fails the test."""
    from playwright.sync_api import sync_playwright

    elsewhere = []

    def note(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", note)
        page.goto(address)
        page.wait_for_selector("#files input[type=file]", state="attached")
        yield page
        assert page.is_closed() or "Traceback" not in page.content()
        browser.close()
    assert elsewhere == []


def show(tab, *paths: Path) -> None:
    tab.set_input_files("#files input[type=file]", paths)


def ask(tab, question: str, num_answers: int = 1) -> str:
    """Ask, wait until the answer was cut, as all of random weights are, and give it."""
    tab.fill("#question textarea", question)
    tab.click("#ask")
    answers = "#talk [data-testid=bot]"
    tab.wait_for_function(f"document.querySelectorAll('{answers}').length == {num_answers}")
    tab.wait_for_selector("#notice [role=status]:has-text('was cut')")
    return tab.locator(answers).last.inner_text()


def shown_as(answer: str) -> str:
    """Text as a browser gives it: white space is one space, and control characters are none or boxes."""
    return "".join(character for character in answer if character.isprintable() and not character.isspace())


def test_pictures_are_shown_a_question_is_answered_and_a_broken_file_is_named(tab, folders, pictures, broken):
    show(tab, *pictures, broken)
    tab.wait_for_selector("#notice [role=alert]")
    assert tab.inner_text("#notice").startswith("broken.png: cannot be decoded as a picture")
    tab.wait_for_function("document.querySelectorAll('#tiles .thumbnail-item img').length == 2")
    assert "wide.png: 18 tokens" in tab.inner_text("#tiles")
    conversation = Conversation(folders[0], max_new_tokens=12, images=pictures)
    answer = ask(tab, "what differs?")
    assert shown_as(answer) == shown_as(conversation.answer("what differs?"))
    assert tab.locator("#talk [data-testid=user] img").count() == 2
    assert shown_as(ask(tab, "and now?", 2)) == shown_as(conversation.answer("and now?"))

    tab.click("#look")
    tab.wait_for_selector("#heat img")
    assert tab.locator("#tokens [role=button]").count() == 12
    before = tab.inner_text("#heat")
    assert "wide.png, thumbnail: " in before
    tab.locator("#tokens [role=button]").nth(5).click()
    tab.wait_for_function("before => document.querySelector('#heat').innerText != before", arg=before)
    of_language_model = tab.inner_text("#heat")
    tab.click("#section >> text=holistic layers")
    tab.wait_for_function("before => document.querySelector('#heat').innerText != before", arg=of_language_model)


def test_what_the_page_cannot_do_is_said_in_it(tab):
    tab.click("#look")
    tab.wait_for_selector("#notice [role=alert]:has-text('no answer yet')")
    tab.click("#ask")
    tab.wait_for_selector("#notice [role=alert]:has-text('Write a question')")
    tab.fill("#question textarea", "fox " * 2000)
    tab.click("#ask")
    tab.wait_for_selector("#notice [role=alert]:has-text('positions')")
    assert tab.input_value("#question textarea").startswith("fox fox")  # what was written is not lost
    assert tab.locator("#talk [data-testid=user]").count() == 0


def test_another_model_answers_in_a_new_chat(tab, folders, pictures):
    show(tab, pictures[1])
    tab.wait_for_selector("#tiles img")
    ask(tab, "what?")
    tab.click("#model input")
    tab.click(f"[role=option]:has-text({folders[1]!r})")
    tab.wait_for_function("document.querySelectorAll('#talk [data-testid=bot]').length == 0")
    expected = Conversation(folders[1], max_new_tokens=12, images=[pictures[1]]).answer("what?")
    tab.wait_for_function("document.querySelector('#notice').innerText.trim() == ''")
    assert shown_as(ask(tab, "what?")) == shown_as(expected)
    tab.click("#new")
    tab.wait_for_function("document.querySelectorAll('#talk [data-testid=bot], #tiles img').length == 0")


def test_a_chat_whose_tab_is_closed_is_forgotten(tab, desk, pictures):
    wait_until(lambda: len(desk.chats) == 0)  # those of the tests before
    show(tab, pictures[1])
    tab.wait_for_selector("#tiles img")
    assert len(desk.chats) == 1
    tab.close()
    wait_until(lambda: len(desk.chats) == 0)


def test_files_of_the_page_are_deleted_after_a_while(tab, blocks, pictures):
    from gradio.route_utils import delete_files_created_by_app

    show(tab, *pictures)
    tab.wait_for_selector("#tiles img")
    ask(tab, "what?")
    tab.click("#look")
    tab.wait_for_selector("#heat img")
    frequency, age = blocks.delete_cache
    assert (frequency, age) == (60, 3600)
    kept = Path(os.environ["GRADIO_TEMP_DIR"])
    assert len(filled(kept)) >= 6  # uploaded, drawn, in the chat
    delete_files_created_by_app(blocks, age=-1)  # as gradio does each minute, when all are too old
    assert filled(kept) == []


def filled(folder: Path) -> list[Path]:
    """Files that are not empty; gradio makes an empty one for each upload."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_port_that_is_taken_is_one_line(desk, blocks):
    from hovle.app.page import open_page

    with pytest.raises(ValueError, match=rf"127.0.0.1:{blocks.server_port} cannot be listened at"):
        open_page(desk, "127.0.0.1", blocks.server_port)


def test_names_are_no_markup():
    from hovle.app.page import _fault

    assert "<b>" not in _fault("<b>.png: cannot be read")
