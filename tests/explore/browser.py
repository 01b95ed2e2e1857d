"""A real browser, Debian's Chromium driven by Playwright; and a session's server in a thread.

As a command it makes screenshots of a running explorer, both themes at two widths:
    engrammar explore MODEL &
    python tests/explore/browser.py 'http://127.0.0.1:8765/?token=...' FOLDER
"""

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = {"wide": 1280, "narrow": 390}


def why_no_browser() -> str | None:
    """Why there is no browser to test with; None if there is one."""
    if find_spec("playwright") is None:
        return "playwright is not installed: pip install -e '.[test]'"
    if shutil.which("chromium") is None:
        return "there is no chromium: apt-get install chromium"
    return None


@contextmanager
def browsing() -> Iterator:
    """A persistent context of a new, empty profile; downloads are allowed."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as profile, sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=shutil.which("chromium"), args=FLAGS, accept_downloads=True, headless=True
        )
        context.set_default_timeout(60_000)  # a machine that is busy
        try:
            yield context
        finally:
            context.close()


@contextmanager
def served(session) -> Iterator:
    """A session's server on a free port."""
    from engrammar_explore.serving import Server

    server = Server(session, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.server.started:
            time.sleep(0.01)
        yield server
    finally:
        server.stop()
        thread.join()
        session.close()


def open_page(context, url: str):
    """A page that has drawn its first text; whatever it complains of on the console ends the test."""
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(url)
    page.wait_for_selector("body[data-ready=yes]")
    return page


def until(page, script: str) -> None:
    """Waits until a script is true. (`wait_for_function` evaluates in the page, which its policy forbids.)"""
    ends = time.monotonic() + 60
    while not page.evaluate(script):
        assert time.monotonic() < ends, f"{script} did not come true; the page says {page.text_content('#problem')!r}"
        page.wait_for_timeout(30)


def screenshots(context, url: str, folder: Path) -> list[Path]:
    """The whole page in both themes at two widths."""
    folder.mkdir(parents=True, exist_ok=True)
    made, page = [], open_page(context, url)
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        for name, width in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": 900})
            made.append(folder / f"{theme}-{name}.png")
            page.screenshot(path=made[-1], full_page=True)
    page.close()
    return made


if __name__ == "__main__":
    with browsing() as opened:
        for path in screenshots(opened, sys.argv[1], Path(sys.argv[2])):
            print(path)
