from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT

from fedcmp.cli import COMMANDS, main


def commands() -> list[list[str]]:
    found = []
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)  # type: ignore[attr-defined]
        found.append([name])
        if isinstance(command, click.Group):
            found += [[name, sub] for sub in command.commands]
    return found


@pytest.mark.parametrize("words", [[], *commands()], ids=" ".join)
def test_every_command_has_an_example(words: list[str]) -> None:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"fedcmp {' '.join(words)}".strip() in result.output


@pytest.mark.parametrize(("options", "shown"), [((), False), (("-W", "default"), True)])
def test_what_other_packages_announce_is_not_for_users(
    options: tuple[str, ...], shown: bool, tmp_path: Path
) -> None:
    (tmp_path / "theirs.py").write_text(
        "import subprocess, sys, warnings, click\n"
        "@click.command()\n"
        "def report():\n"
        "    for category in (DeprecationWarning, FutureWarning):\n"
        "        warnings.warn(f'old {category.__name__}', category)\n"
        "    child = \"import warnings; warnings.warn('old in a child', FutureWarning)\"\n"
        "    subprocess.run([sys.executable, '-c', child], check=True)\n"
        "    warnings.warn('your disk smokes')\n"
    )
    code = "import sys, theirs, fedcmp.cli; sys.modules['fedcmp.commands.report'] = theirs; fedcmp.cli.run()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    result = subprocess.run(
        [sys.executable, *options, "-c", code, "report"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert result.returncode == 0
    assert "your disk smokes" in result.stderr
    for text in ("old DeprecationWarning", "old FutureWarning"):
        assert (text in result.stderr) == shown
    assert shown or "in a child" not in result.stderr


ENDLESS = """
import sys
import time
from types import SimpleNamespace
import click
from fedcmp import cli

def callback():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

sys.modules["fedcmp.commands.extract"] = SimpleNamespace(extract=click.Command("extract", callback=callback))
cli.main(["extract"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_in_order(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # What a shell runs in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == "cleaned up\n"
    assert errors == "fedcmp: interrupted; run the same command to go on\n"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fedcmp", *words], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["extract", "nowhere.toml"], ["nowhere.toml", "no such file"]),
        (["exract"], ["exract", "did you mean 'extract'"]),
        (["extract", "configs/demo.toml", "--set", "extract.batch_sise=3"], ["batch_sise", "'batch_size'"]),
        (["extract", "configs/demo.toml", "--set", "nonsense"], ["nonsense", "key.sub=value"]),
        (["extract", "configs/demo.toml", "--silo", "falt"], ["falt", "did you mean 'flat'"]),
        (["federate", "configs/demo.toml", "--set", "features=/none"], ["/none/flat.zarr", "fedcmp extract"]),
        (["evaluate", "configs/demo.toml", "--set", "build=/none"], ["/none/runs/demo/demo", "federate"]),
    ],
)
def test_a_mistake_is_one_clear_line(words: list[str], parts: list[str]) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()[-1:]) == 1
    for part in parts:
        assert part in result.stderr


def test_a_reader_that_has_seen_enough_is_no_mistake() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fedcmp", "benchmarks"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_full_disk_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "shard"))

    monkeypatch.setattr("fedcmp.pipeline.world.write.write", full)
    result = CliRunner().invoke(main, ["world", "write", str(tmp_path)])
    assert result.exit_code == 2
    assert "No space left on device" in result.output
    assert "rerun" in result.output
