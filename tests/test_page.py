"""The report page in a real headless Chromium, driven by chromedriver's plain HTTP protocol."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import picture

from fedcmp.evaluate.report.collect import _thumbnail
from fedcmp.evaluate.report.page import RunResult, Said, Sample, page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
DOWN, END, ENTER, TAB = "\ue015", "\ue010", "\ue007", "\ue004"

needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver on PATH (Debian: chromium-driver)"
)


def run(name: str) -> RunResult:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 4}
    history = [{"client": "lab", "round": n, "loss": 1.0 / (n + 1)} for n in range(3)]
    scores = {"pope": {"f1": score}, "captions": {"CIDEr-D": score}}
    return RunResult(name, "fedavg", scores, [("pope", "f1")], {"pope": "2 missing images"}, history)


def samples() -> list[Sample]:
    """Four questions of one benchmark, right and wrong in all four ways, and two captions."""
    found = [
        Sample(
            "pope",
            f"{n}.png",
            picture(n),
            f"Is there <b>dog</b> {n}?",
            "yes",
            [Said("one", "Yes", n % 2 == 0), Said("two & <i>", "No " * (300 if n == 3 else 1), n < 2)],
        )
        for n in range(4)
    ]
    unseen = [Said("one", "", None), Said("two & <i>", "a dog", None)]
    return [*found, *(Sample("captions", f"{n}.png", None, "Caption it.", "a cat", unseen) for n in (8, 9))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    columns = [("pope", "f1"), ("captions", "CIDEr-D")]
    path.write_text(page("study <1>", [run("one"), run("two & <i>")], columns, samples()))
    return path


def test_the_page_needs_nothing_outside_it(report: Path) -> None:
    content = report.read_text()
    for outside in ("http://", "https://", "src=/", "<link", "@import", "url("):
        assert outside not in content.replace("http://www.w3.org/2000/svg", "")
    assert "<b>dog" not in content
    assert "2 missing images" in content
    assert content.count("<article") == 6
    assert content.count("<img") == 4


def test_only_pictures_of_the_folder_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "id_ed25519").write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (tmp_path / "private.png").write_bytes(picture(1))
    (folder / "text.png").write_bytes(b"password\n")
    (folder / "a.png").write_bytes(picture(1))
    (folder / "a.bmp").write_bytes(picture(1, form="bmp"))
    (folder / "large.png").write_bytes(picture(1, size=(900, 900)))
    for name in ("../private.png", "../id_ed25519", str(tmp_path / "private.png"), "x/../../private.png"):
        assert _thumbnail(folder, name) is None
    for name in ("text.png", "gone.png", ""):
        assert _thumbnail(folder, name) is None
    assert _thumbnail(folder, "a.png") == (picture(1), "png")
    for name in ("a.bmp", "large.png"):
        shown = _thumbnail(folder, name)
        assert shown is not None
        assert (shown[1], shown[0][:3]) == ("jpeg", b"\xff\xd8\xff") if name == "a.bmp" else shown[0]
    data = (folder / "large.png").read_bytes()
    (folder / "large.png").write_bytes(data[:33] + b"\xff" * 8 + data[41:])
    assert _thumbnail(folder, "large.png") is None


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
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, path: Path) -> None:
        self._post("/url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        return self._post("/execute/sync", {"script": f"return {script}", "args": []})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._post("/se/log", {"type": kind})
        return found

    def screenshot(self) -> bytes:
        with urllib.request.urlopen(self._base + "/screenshot", timeout=60) as reply:
            return base64.b64decode(json.load(reply)["value"])

    def close(self) -> None:
        request = urllib.request.Request(self._base, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
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


VISIBLE = "[...document.querySelectorAll('article')].filter(a => a.offsetParent).length"
ANSWERS = "[...document.querySelectorAll('[data-run]')].filter(a => a.offsetParent).length"
COUNT = "document.querySelector('#count').textContent"


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desk", "phone"])
def test_filters_work_from_the_file_system_and_by_keyboard(
    port: int, report: Path, width: int, height: int, tmp_path: Path
) -> None:
    browser = Browser(port, width, height)
    try:
        browser.open(report)
        assert (browser.run(VISIBLE), browser.run(COUNT)) == (6, "6 of 6 questions")
        pictures = "[...document.images].map(i => { i.loading = 'eager'; return i.decode().then(() => 1) })"
        assert browser.run(f"Promise.all({pictures})") == [1] * 4
        # Tab to the first filter; its second choice is the first run.
        browser.run("document.querySelector('[name=run]').focus()")
        browser.press(DOWN)
        assert browser.run("document.querySelector('[name=run]').value") == "one"
        assert browser.run(ANSWERS) == 6
        browser.press(TAB)
        assert browser.run("document.activeElement.name") == "benchmark"
        browser.press(DOWN)
        assert (browser.run(VISIBLE), browser.run(COUNT)) == (4, "4 of 6 questions")
        browser.press(TAB, DOWN, DOWN)
        assert browser.run("document.activeElement.value") == "wrong"
        assert browser.run(VISIBLE) == 2
        shown = "[...document.querySelectorAll('article')].filter(a => a.offsetParent)"
        asked = f"{shown}.map(a => a.querySelector('p').textContent)"
        assert browser.run(asked) == ["Is there <b>dog</b> 1?", "Is there <b>dog</b> 3?"]
        # From card to card, without leaving those that are shown.
        browser.run("document.activeElement.blur()")
        browser.press("j", "j", "j", "k")
        assert (
            browser.run("document.activeElement.querySelector('p').textContent") == "Is there <b>dog</b> 1?"
        )
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        if width < 600:
            assert browser.run("window.innerWidth") == width
            size = "parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)"
            assert browser.run(size) >= 14
        assert not [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"]
        requested = [
            json.loads(entry["message"])["message"]["params"]["request"]["url"]
            for entry in browser.log("performance")
            if 'Network.requestWillBeSent"' in entry["message"]
        ]
        assert all(url.startswith(("file:", "data:")) for url in requested)
        (tmp_path / "report.png").write_bytes(browser.screenshot())
    finally:
        browser.close()
