"""Work in processes of its own: endless and crashing ones end in one line, and good ones are as here."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from fedcmp.cli import main
from fedcmp.extract.sources.base import Skipped
from fedcmp.extract.sources.hdf5 import Hdf5
from fedcmp.pipeline import apart as module
from fedcmp.pipeline.apart import apart
from fedcmp.pipeline.errors import UserError

HERE = Path("a.h5")


def counted(number: int) -> Iterator[int]:
    print("noise")
    os.write(1, b"more noise")
    yield from range(number)


def endless() -> Iterator[int]:
    yield 1
    while True:
        pass


def patient(seconds: float) -> Iterator[int]:
    for number in range(2):
        time.sleep(seconds)
        yield number


def crashing(how: str) -> Iterator[bytes]:
    yield b"x" * 100_000
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how == "kill":
        os.kill(os.getpid(), 9)
    else:
        os._exit(3)


def raising(error: Exception) -> Iterator[int]:
    yield 1
    raise error


def whose() -> Iterator[int]:
    while True:
        yield os.getpid()


def test_what_is_yielded_comes_through_in_order() -> None:
    assert list(apart(HERE, counted, 1000)) == list(range(1000))


def test_what_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.5)
    items = apart(HERE, endless)
    assert next(items) == 1
    with pytest.raises(
        UserError, match=r"a\.h5: damaged, as reading it comes to no end \(stopped after 0\.5"
    ):
        next(items)


def test_to_wait_is_not_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a slow disk, say, or for whoever takes what is yielded."""
    monkeypatch.setattr(module, "SECONDS", 0.3)
    items = apart(HERE, patient, 0.6)
    for number in range(2):
        assert next(items) == number
        time.sleep(0.6)
    assert next(items, None) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("segfault", "damaged, as reading it crashes .Segmentation fault.; have it sent again"),
        ("abort", "damaged, as reading it crashes .Aborted.; have it sent again"),
        ("kill", "was killed; see that memory does not run out"),
    ],
)
def test_a_crash_is_one_line(how: str, message: str) -> None:
    items = apart(HERE, crashing, how)
    assert len(next(items)) == 100_000
    with pytest.raises(UserError, match=message):
        next(items)


def test_what_else_ends_the_process_is_no_damage() -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        list(apart(HERE, crashing, "exit"))


@pytest.mark.parametrize("error", [UserError("no, because"), MemoryError(), OSError(28, "full"), EOFError(7)])
def test_errors_come_through(error: Exception) -> None:
    items = apart(HERE, raising, error)
    assert next(items) == 1
    with pytest.raises(type(error)) as caught:
        next(items)
    assert caught.value.args == error.args


def test_whoever_stops_early_leaves_no_process() -> None:
    items = apart(HERE, whose)
    child = next(items)
    assert child != os.getpid()
    os.kill(child, 0)
    items.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_modules_are_those_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fedcmp.py").write_text("raise SystemExit(9)")
    (tmp_path / "h5py.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    assert list(apart(HERE, counted, 2)) == [0, 1]


def with_endless_heap(path: Path) -> None:
    """HDF5 in which a string's length sends libhdf5 round and round: with it, the next one is itself."""
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((40, 4, 4, 3), np.uint8)
        file["captions"] = [f"Bild {row:03d}" for row in range(40)]
    data = bytearray(path.read_bytes())
    size = data.index(b"GCOL") + 16 + 14 * 24 + 8
    assert int.from_bytes(data[size : size + 8], "little") == 8
    data[size : size + 8] = (2**64 - 16).to_bytes(8, "little")
    path.write_bytes(data)


def test_hdf5_on_which_its_library_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 2.0)
    with_endless_heap(tmp_path / "d.h5")
    with pytest.raises(UserError, match=r"d\.h5: damaged, as reading it comes to no end"):
        list(Hdf5(path=tmp_path / "d.h5").records())
    assert Hdf5(path=tmp_path / "d.h5").size() == 40


def test_extract_refuses_it_in_one_line(
    tmp_path: Path, extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 2.0)
    with_endless_heap(tmp_path / "d.h5")
    path = tmp_path / "damaged.toml"
    path.write_text(
        f'extends = "{extracted}"\nbuild = "{tmp_path}"\n'
        f'[extract.silos.damaged]\nname = "hdf5"\npath = "{tmp_path}/d.h5"\n'
    )
    result = CliRunner().invoke(main, ["extract", str(path), "--silo", "damaged"])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    said = " ".join(result.output.split())
    assert "damaged, as reading it comes to no end (stopped after 2 s of computing); have it sent" in said


def test_rows_are_the_same_here_and_apart(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 255, (70, 4, 4, 3), np.uint8)
        file["captions"] = [f"Bild {row}" if row % 9 else "" for row in range(70)]
    source = Hdf5(path=tmp_path / "d.h5")
    rows = list(source.records())
    assert rows == list(source.records_here())
    assert sum(isinstance(row, Skipped) for row in rows) == 8
