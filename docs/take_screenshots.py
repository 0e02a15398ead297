"""Pictures of every view of the page for the docs: `python docs/take_screenshots.py [MODEL]` (Playwright, Chromium).

Starts the page on the champion, or on the model that is named, and writes docs/images/*.png.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
CHROMIUM = "/usr/bin/chromium"
PATIENCE = 600  # seconds for the page to come up
SUDOKU = "1030340020030001"  # stands in the grid at first


def main(model: str) -> None:
    """Takes them all."""
    IMAGES.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--port", str(port), *(["--model", model] if model else [])]
    server = subprocess.Popen([sys.executable, "-m", "app", *arguments])
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(url, server)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            chat(browser, url)
            views(browser, url)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Until the page answers."""
    for _ in range(PATIENCE):
        if server.poll() is not None:
            raise SystemExit("the page did not start")
        try:
            urllib.request.urlopen(url)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise SystemExit("the page did not come up")


def opened(browser: Browser, url: str, *, dark: bool = False, width: int = 1280) -> Page:
    """The page, ready."""
    page = browser.new_page(viewport={"width": width, "height": 860}, device_scale_factor=1)
    page.set_default_timeout(300_000)
    page.goto(f"{url}?__theme={'dark' if dark else 'light'}")
    page.wait_for_selector("#send")
    page.wait_for_timeout(800)
    return page


def ask(page: Page, text: str) -> None:
    """Asks and waits for the answer."""
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def done(page: Page) -> None:
    """Until nothing is being written."""
    page.wait_for_function(
        "() => document.querySelector('#talk .turn.model') && !document.querySelector('#talk .wait')"
    )
    page.wait_for_timeout(300)


def shot(page: Page, name: str) -> None:
    """Writes one picture."""
    page.evaluate("() => document.querySelectorAll('.sidebar, .sidebar *').forEach(part => { part.scrollTop = 0; })")
    page.screenshot(path=IMAGES / f"{name}.png")
    sys.stdout.write(f"{IMAGES / name}.png\n")


def chat(browser: Browser, url: str) -> None:
    """Chat while it writes and afterwards, dark, narrow."""
    page = opened(browser, url)
    page.get_by_label("Show guesses").check()
    page.locator("#speed").get_by_role("radio", name="slow").check()
    ask(page, f"Solve the sudoku {SUDOKU}")
    page.wait_for_function("() => document.querySelectorAll('#talk .tiles i.d').length >= 10")
    shot(page, "chat-writing")
    page.locator("#speed").get_by_role("radio", name="instant").check()
    done(page)
    page.click("#new")
    page.wait_for_selector("#talk .welcome")
    ask(page, "Seat these people anew: 168954732")
    done(page)
    shot(page, "chat")
    page.get_by_role("tab", name="Replay").click()
    page.frame_locator("#replay iframe").locator("#at").wait_for()
    page.click("#runners")
    page.wait_for_function("() => document.querySelector('#replay iframe').srcdoc.includes('\"runners\":{\"')")
    inside = page.frame_locator("#replay iframe")
    inside.locator("#at").fill("3")
    inside.locator("#guess").check()
    inside.locator("#tiles i.f").first.hover()
    shot(page, "replay")
    page.close()
    for name, dark, width in (("chat-dark", True, 1280), ("chat-narrow", False, 430)):
        page = opened(browser, url, dark=dark, width=width)
        ask(page, f"Solve the sudoku {SUDOKU}")
        done(page)
        shot(page, name)
        page.close()


def views(browser: Browser, url: str) -> None:
    """The other tabs."""
    page = opened(browser, url)
    page.get_by_role("tab", name="Sudoku").click()
    page.click("#solve")
    page.wait_for_function("() => document.querySelector('#verdict').innerText.includes('olved')")
    shot(page, "sudoku")
    page.get_by_role("tab", name="Infill").click()
    page.fill("#gaps textarea", f"Solve the sudoku {SUDOKU}")
    page.fill("#pins textarea", "0:1234, 12:4321")
    page.click("#fill")
    page.wait_for_function("() => document.querySelector('#infilled-text textarea').value")
    shot(page, "infill")
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare")
    page.wait_for_function("() => ['left', 'right'].every(s => document.querySelector(`#${s}-answer textarea`).value)")
    shot(page, "compare")
    page.get_by_role("tab", name="Model").click()
    page.click("#load")
    page.wait_for_selector("#loaded :text('is loaded')")
    page.wait_for_timeout(800)
    shot(page, "model")
    page.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
