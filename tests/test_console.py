"""What reaches a terminal: whole numbers at any width, and no control character of somebody else's."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from fedcmp.pipeline.console import cleaned, complain, progress, say, table

SILOS = (
    "Feature caches in build/features",
    ["silo", "images", "texts", "skipped", "MB", "images/s", "state"],
    [["hospital_of_berlin", "1,152,000", "2,304,123", "17", "658,213.4", "1,234", "resumed at shard 12"]],
)
RUNS = ("centralised", "fedavg", "fedcmp", "local_only", "untrained")
METRICS = (
    "loss: loss",
    "captions: object F1",
    "captions: CIDEr-D",
    "pope: f1",
    "pope: accuracy",
    "vqa: accuracy",
)
DEMO = (
    "demo: value and 95 % bootstrap interval over images",
    ["run", *(metric.replace(": ", ":\n") for metric in METRICS)],
    [[run, *(f"{n}.021\n({n}.016-{n}.025)" for n in range(len(METRICS)))] for run in RUNS],
)
COMPARE = (
    "one minus other, 1 seed",
    [
        "metric",
        "one",
        "other",
        "difference",
        "95 % over images",
        "p",
        "p (Holm)",
        "McNemar",
        "sd over seeds",
        "n",
    ],
    [
        [
            "mmbench: l2-category finegrained_perception (cross-instance)",
            "0.701",
            "0.688",
            "+0.013",
            "+0.001 to +0.025",
            "0.0312",
            "0.0624",
            "0.0411",
            "-",
            "4,329",
        ]
    ],
)
TABLES = {"silos": SILOS, "demo": DEMO, "compare": COMPARE}


def on_terminal(code: str, columns: int) -> str:
    """What a program prints on a real pseudo-terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux ends a pseudo-terminal so
            break
        if not block:
            break
        shown += block
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()
    return re.sub("\x1b\\[[0-9;]*m", "", shown.decode()).replace("\r", "")


def printed(columns: int) -> dict[str, str]:
    code = f"from fedcmp.pipeline.console import table\nfor name, each in {TABLES!r}.items():\n"
    code += "    table(*each)\n    print(f'end of {name}')"
    parts = re.split(r"end of (\w+)\n", on_terminal(code, columns))
    return dict(zip(parts[1::2], parts[::2], strict=False))


@pytest.mark.parametrize("columns", [200, 120, 112, 100, 80, 60, 40, 20])
def test_nothing_is_cut_at_any_width(columns: int) -> None:
    shown = printed(columns)
    for name, (_, heads, rows) in TABLES.items():
        assert "\u2026" not in shown[name]
        for cell in [cell for row in rows for cell in row] + list(heads):
            for line in cell.split("\n"):
                assert line in shown[name], (columns, name, line)
        if columns >= 40:
            lines = shown[name].splitlines()
            boxes = [line for line in lines if line[:1] in "┏┃┡│└"]
            assert all(len(line) <= columns for line in boxes)
    assert ("part 1 of" in shown["demo"]) == (40 <= columns < 112)


def test_the_demos_table_is_whole_from_112_columns() -> None:
    for columns in (120, 200):
        assert printed(columns)["demo"].count("┏") == 1
    readme = (ROOT / "README.md").read_text()
    heads = [line for line in readme.splitlines() if line.startswith("┃")]
    assert heads
    assert max(map(len, heads)) <= 112


HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "\x9b31m": r"\x9b31m",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "a\nfedcmp: all is well": r"a\nfedcmp: all is well",
    "a\r\x08b": r"a\r\x08b",
    "\u202egnp.exe": r"\u202egnp.exe",
    "a\u2028b\x7f\x00": r"a\u2028b\x7f\x00",
    "\udcff": r"\udcff",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_shown_instead_of_done(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = HOSTILE[text]
    assert cleaned(text) == seen
    say(f"silo {text}")
    complain(f"silo {text}")
    table(f"about {text}", ["silo", f"head {text}"], [[f"x {text}", "1"]])
    out, err = capsys.readouterr()
    assert out.startswith(f"silo {seen}\n")
    assert err == f"silo {seen}\n"
    assert f"about {seen}" in out
    assert not {*(out + err)} & {*"\x1b\x9b\x07\r\x08\x00\x7f\u202e\u2028"}


def test_ordinary_text_stays(capsys: pytest.CaptureFixture[str]) -> None:
    text = "Zürich 日本語 عربي [bold]x[/bold] :smile: \u00a0 5 µm"
    say(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_errors_of_a_command_are_one_line(capfd: pytest.CaptureFixture[str], tmp_path: object) -> None:
    name = "no\x1b[31mwhere\nfedcmp: fine.toml"
    command = [sys.executable, "-m", "fedcmp", "score", name]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("fedcmp: no\\x1b[31mwhere\\nfedcmp: fine.toml: no such file")
    assert result.stderr.count("\n") == 1


def test_a_log_tells_speed_time_left_and_the_last_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 40.0, 50.0, 100.0])
    monkeypatch.setattr("fedcmp.pipeline.console.time.monotonic", lambda: next(now))
    with progress("fedcmp", 40, "steps") as task:
        task.advance(4)
        task.note("round 1: loss 2.500")
        task.advance(1)
        task.advance(3)
    assert capsys.readouterr().out.splitlines() == [
        "fedcmp: 4/40 steps, 10.0 s each, 0:06:00 left",
        "fedcmp: 8/40 steps, 12.5 s each, round 1: loss 2.500, 0:06:40 left",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_may_begin_with_nothing_done(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcmp.pipeline.console._LOG_EVERY_SECONDS", -1.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with progress("answers", 4, "answers") as task:
        for number in (0, 0, 2, 2):
            task.advance(number)
