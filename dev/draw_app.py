"""Take the pictures of `hovle app` for the documentation: a chat, and where a token of the answer looks.

  python dev/draw_app.py MODEL PICTURE "QUESTION"      writes dev/app.png; needs 'hovle[app]', playwright and Chromium

The model must be one that answers: what is on the picture is what it said.
"""

import argparse
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def talk(page: Page, picture: Path, question: str, token: int) -> None:
    """Show a picture, ask, wait for the answer, and look where one of its tokens looks."""
    page.wait_for_selector("#files input[type=file]", state="attached")
    page.set_input_files("#files input[type=file]", picture)
    page.wait_for_selector("#tiles img")
    page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_selector("#talk [data-testid=bot]", timeout=600_000)
    page.click("#look")  # waits in line for the answer's end
    page.wait_for_selector("#heat img", timeout=600_000)
    page.locator("#tokens [role=button]").nth(token).click()
    page.wait_for_timeout(2000)  # drawings come one after another
    page.evaluate("document.activeElement.blur()")


def main() -> None:
    """Start the page, talk, and take its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--token", type=int, default=0, help="which of the answer's tokens is clicked, from 0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "app.png")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="Chromium to drive")
    args = parser.parse_args()
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "hovle", "app", args.model, "--port", str(port)])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.browser, args=SWITCHES)
            with closing(browser):
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                wait_for(port, server)
                page.goto(f"http://127.0.0.1:{port}")
                talk(page, args.picture, args.question, args.token)
                page.screenshot(path=args.out, full_page=True)
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Wait until the page is there."""
    while server.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise SystemExit("`hovle app` ended before the page was there.")


if __name__ == "__main__":
    main()
