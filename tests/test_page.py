"""The report page by itself, and in a real headless Chromium: filters, keyboard, phone, print, dark, axe."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BROWSER, DRIVER, NEEDED, driver, opened
from conftest import ROOT, picture

from fedcmp.evaluate.report import training
from fedcmp.evaluate.report.heat import heat_map
from fedcmp.evaluate.report.page import page
from fedcmp.evaluate.report.results import Comparison, Grouped, Report, RunResult, Said, Sample, Versus
from fedcmp.evaluate.report.samples import thumbnail

DOWN, TAB = "\ue015", "\ue004"
AXE = Path(os.environ.get("AXE", ROOT / "build/axe/node_modules/axe-core/axe.min.js"))
CLIENTS, ROUNDS = 24, 100

needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason=NEEDED)
slow = pytest.mark.skipif("not config.getoption('--slow')")


def run(name: str) -> RunResult:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 4}
    history: list[dict] = []
    for number in range(ROUNDS):
        for client in range(CLIENTS):
            # Each is absent once in eight rounds.
            if (number + client) % 8:
                figures = {"loss": 3.0 / (number + 1) + client / 10, "reliability": client / (CLIENTS - 1)}
                history.append({"client": f"hospital-{client:02d}", "round": number, **figures})
        history.append({"client": None, "round": number, "loss": 3.0 / (number + 1)})
    scores = {"pope": {"f1": score}, "captions": {"CIDEr-D": score}}
    better = {("pope", "f1"): "higher"}
    facts = {"seed": "0", "LLM": name}
    notes = {"pope": "2 missing images"}
    return RunResult(
        name, "fedavg", scores, [("pope", "f1")], notes, history, better, facts=facts, silos={"lab": 7}
    )


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


def study() -> Report:
    totals = {
        "pope": {
            "": {"": 300, "right": 260, "wrong": 170, "disagree": 130},
            "one": {"": 300, "right": 194, "wrong": 106, "disagree": 130},
            "two & <i>": {"": 300, "right": 196, "wrong": 104, "disagree": 130},
        },
        "captions": {"": {"": 40}, "one": {"": 40}, "two & <i>": {"": 40}},
    }
    column = ("pope", "f1")
    versus = Versus("two & <i>", column, 0.5, 0.5, 0.1, 0.05, 0.15, 0.001, 0.004, 300, 0, "better")
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    groups = [
        Grouped(column, "folder of the images", "higher", {n: {"one": score} for n in ("lab", "clinic")})
    ]
    return Report(
        "study <1>",
        [run("one"), run("two & <i>")],
        {"three": "no finished run here"},
        [column, ("captions", "CIDEr-D")],
        Comparison("one", [versus], ["two & <i>, captions: no answers of one"]),
        groups,
        samples(),
        totals,
    )


def charts() -> dict[str, str]:
    return training.curves(study().runs) | training.weights(study().runs)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(study(), charts(), {"scores.csv": "scores"}))
    return path


def test_the_page_needs_nothing_outside_it(report: Path) -> None:
    content = report.read_text().replace("http://www.w3.org/2000/svg", "").replace("url(#", "")
    for outside in ("http://", "https://", "src=/", "<link", "@import", "url("):
        assert outside not in content
    assert "<b>dog" not in content
    assert "2 missing images" in content
    assert content.count("<article") == 6
    assert content.count("<img") == 4
    # Two heat maps and fifty lines of a hundred rounds stay light.
    assert len(content) < 400_000


def test_what_is_missing_is_named(report: Path) -> None:
    content = report.read_text()
    assert "<b>three</b> is not in this report: no finished run here" in content
    assert "two &amp; &lt;i&gt;, captions: no answers of one" in content


def test_ids_are_unique_and_links_lead_somewhere(report: Path) -> None:
    content = report.read_text()
    ids = re.findall(r' id="?([\w-]+)', content)
    assert len(ids) == len({*ids})
    for target in re.findall(r'(?:href="#|url\(#)([\w-]+)', content):
        assert target in ids


def test_charts_are_files_by_themselves_with_axes_and_legends() -> None:
    made = charts()
    assert {"loss.svg", "loss-one.svg", "reliability-one.svg"} <= made.keys()
    for svg in made.values():
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label")
        said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"round", "1", str(ROUNDS)} <= {*said}
    words = [e.text for e in ElementTree.fromstring(made["loss.svg"]).iter() if e.tag.endswith("text")]
    assert {"one", "two & <i>"} <= {*words}
    assert any("nats a supervised token" in str(word) for word in words)
    # Two dozen lines are told apart by colour and dash.
    strokes = re.findall(r'<polyline [^>]*stroke-width="2" (stroke=[^>]*)>', made["loss-one.svg"])
    assert len(strokes) == len({*strokes}) == CLIENTS


def test_absent_is_not_unreliable() -> None:
    figures = {"a": {1: 0.0, 2: 1.0}, "b": {2: 0.5}}
    svg = heat_map("Reliability", figures, 3, 1.0, "x")
    root = ElementTree.fromstring(svg)
    paths = {e.get("fill"): e.get("d", "").count("M") for e in root.iter() if e.get("class")}
    hatched = paths.pop("url(#absent-x)")
    assert hatched == 3
    assert sum(count for fill, count in paths.items() if fill != "#fff") == 3
    assert len(paths) == 4
    assert "absent in 1 of 3 rounds" in str(root.get("aria-label"))


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
        assert thumbnail(folder, name) is None
    for name in ("text.png", "gone.png", ""):
        assert thumbnail(folder, name) is None
    assert thumbnail(folder, "a.png") == (picture(1), "png")
    for name in ("a.bmp", "large.png"):
        shown = thumbnail(folder, name)
        assert shown is not None
        assert (shown[1], shown[0][:3]) == ("jpeg", b"\xff\xd8\xff") if name == "a.bmp" else shown[0]
    data = (folder / "large.png").read_bytes()
    (folder / "large.png").write_bytes(data[:33] + b"\xff" * 8 + data[41:])
    assert thumbnail(folder, "large.png") is None


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with driver() as number:
        yield number


VISIBLE = "[...document.querySelectorAll('article')].filter(a => a.offsetParent).length"
ANSWERS = "[...document.querySelectorAll('[data-run]')].filter(a => a.offsetParent).length"
COUNT = "document.querySelector('#count').textContent"
SIZES = pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desk", "phone"])


@slow
@needs_browser
@SIZES
def test_filters_work_from_the_file_system_and_by_keyboard(
    port: int, report: Path, width: int, height: int
) -> None:
    with opened(port, report, width, height) as browser:
        assert (browser.run(VISIBLE), browser.run(COUNT)) == (6, "6 of 340 questions sampled")
        pictures = "[...document.images].map(i => i.decode().then(() => 1))"
        assert browser.run(f"Promise.all({pictures})") == [1] * 4
        # Tab to the first filter; its second choice is the first run.
        browser.run("document.querySelector('[name=run]').focus()")
        browser.press(DOWN)
        assert browser.run("document.querySelector('[name=run]').value") == "one"
        assert browser.run(ANSWERS) == 6
        browser.press(TAB)
        assert browser.run("document.activeElement.name") == "benchmark"
        browser.press(DOWN)
        assert (browser.run(VISIBLE), browser.run(COUNT)) == (4, "4 of 300 questions sampled")
        browser.press(TAB, DOWN, DOWN)
        assert browser.run("document.activeElement.value") == "wrong"
        # The run's own errors, of as many as it has.
        assert browser.run(COUNT) == "2 of 106 questions answered wrong sampled"
        shown = "[...document.querySelectorAll('article')].filter(a => a.offsetParent)"
        asked = f"{shown}.map(a => a.querySelector('p').textContent)"
        assert browser.run(asked) == ["Is there <b>dog</b> 1?", "Is there <b>dog</b> 3?"]
        browser.press(DOWN)
        assert browser.run(COUNT) == "2 of 130 questions that runs disagree about sampled"
        assert browser.run(asked) == ["Is there <b>dog</b> 1?", "Is there <b>dog</b> 2?"]
        # From card to card, without leaving those that are shown.
        browser.run("document.activeElement.blur()")
        browser.press("j", "j", "j", "k")
        focused = "document.activeElement.querySelector('p').textContent"
        assert browser.run(focused) == "Is there <b>dog</b> 1?"
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
        assert not [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"]
        requested = [
            json.loads(entry["message"])["message"]["params"]["request"]["url"]
            for entry in browser.log("performance")
            if 'Network.requestWillBeSent"' in entry["message"]
        ]
        assert all(url.startswith(("file:", "data:")) for url in requested)


@slow
@needs_browser
def test_a_phone_needs_no_sideways_scrolling_and_keeps_the_first_column(port: int, report: Path) -> None:
    with opened(port, report, 390, 844) as browser:
        assert browser.run("document.documentElement.scrollWidth") == browser.run("window.innerWidth") == 390
        assert browser.run("document.documentElement.scrollHeight") < 8 * 844
        size = "parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)"
        assert browser.run(size) >= 14
        wide = "[...document.querySelectorAll('.scroll:has(table)')].find(e => e.scrollWidth > e.clientWidth)"
        moved = (
            f"(() => {{ const area = {wide}; area.scrollLeft = 200; "
            "const gap = area.querySelector('tbody th').getBoundingClientRect().left; "
            "return [area.scrollLeft > 0, gap - area.getBoundingClientRect().left]; })()"
        )
        browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.run(moved) == [True, 0]


@slow
@needs_browser
def test_print_cuts_nothing(port: int, report: Path) -> None:
    with opened(port, report, 1280, 900) as browser:
        assert browser.pdf().startswith(b"%PDF")
        browser.devtools("Emulation.setEmulatedMedia", media="print")
        # A sheet of A4 across, less its margins.
        browser.devtools(
            "Emulation.setDeviceMetricsOverride", width=1032, height=700, deviceScaleFactor=1, mobile=False
        )
        browser.run("dispatchEvent(new Event('beforeprint'))")
        assert browser.run("document.querySelectorAll('details:not([open])').length") == 0
        cut = (
            "[...document.querySelectorAll('table, svg')].filter(e => e.getBoundingClientRect().right > 1033)"
        )
        assert browser.run(f"{cut}.map(e => e.outerHTML.slice(0, 80))") == []
        assert browser.run(
            "[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().width > 0)"
        )


@slow
@needs_browser
@SIZES
def test_axe_finds_nothing_in_light_and_dark(port: int, report: Path, width: int, height: int) -> None:
    if not AXE.is_file():
        pytest.skip("needs axe-core: npm install --prefix build/axe axe-core")
    with opened(port, report, width, height) as browser:
        browser.load(AXE.read_text())
        for dark in (False, True):
            browser.dark(on=dark)
            found = (
                "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 90))]))"
            )
            assert browser.run(found) == []
            background = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) is dark
            assert browser.screenshot().startswith(b"\x89PNG")
