"""A real headless Chromium, driven by chromedriver's plain HTTP protocol."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDED = "needs chromium and chromedriver on PATH (Debian: chromium chromium-driver)"


class Browser:
    """A session of chromedriver."""

    def __init__(self, port: int, width: int, height: int) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        options = {
            "binary": BROWSER,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--window-size={width},{height}",
            ],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0}},
        }
        if width > 600:
            del options["mobileEmulation"]
        logs = {"performance": "ALL", "browser": "ALL"}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        self._base += "/" + self._post("", {"capabilities": wanted})["sessionId"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["value"]

    def open(self, path: Path) -> None:
        self._post("/url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        return self._post("/execute/sync", {"script": f"return {script}", "args": []})

    def load(self, script: str) -> None:
        """Run what returns nothing."""
        self._post("/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._post("/se/log", {"type": kind})
        return found

    def devtools(self, command: str, **params: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._post("/goog/cdp/execute", {"cmd": command, "params": params})
        return found

    def dark(self, *, on: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        found = self.devtools("Page.printToPDF", preferCSSPageSize=True)
        return base64.b64decode(found["data"])

    def close(self) -> None:
        request = urllib.request.Request(self._base, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


@contextmanager
def driver() -> Iterator[int]:
    """Chromedriver's port."""
    assert DRIVER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    process = subprocess.Popen(
        [DRIVER, f"--port={number}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", number), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield number
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def opened(port: int, path: Path, width: int, height: int) -> Iterator[Browser]:
    """A page in a window of a size."""
    browser = Browser(port, width, height)
    try:
        browser.open(path)
        yield browser
    finally:
        browser.close()
