"""What a machine has released of its silos: counted before it is sent, over runs, restarts and kills."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
from conftest import ROOT

from fedcmp.federate.privacy.accounting import spent
from fedcmp.federate.privacy.ledger import Ledger, Release, total
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.privacy import Ledger as Budget

SILO = {"clinic": "abc"}


def release(**changes: object) -> Release:
    return replace(Release("run", 0, "text", "p", 0, 2.0), **changes)  # type: ignore[arg-type]


def test_turns_have_nothing_in_common_and_rounds_that_are_repeated_do() -> None:
    turns = [release(round=turn, turn=turn) for turn in range(5)]
    assert total(turns) == 2.0
    assert total([*turns, release(round=3, turn=3)]) == pytest.approx(2.0 / sqrt(2))
    assert total([*turns, release(partition="q")]) == pytest.approx(2.0 / sqrt(2))
    assert total([*turns, release(round=3, turn=3), release(partition="q", noise=1.0)]) == pytest.approx(
        (1 / 4 + 1 / 4 + 1) ** -0.5
    )
    assert total([]) == float("inf")


def test_whole_clients_are_in_every_round() -> None:
    rounds = [release(unit="client", partition="", turn=0, round=number) for number in range(4)]
    assert total(rounds) == pytest.approx(1.0)


def test_it_is_remembered_over_restarts(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        assert Ledger(Budget(path=tmp_path)).enter(SILO, release()) == expected
    assert Ledger(Budget(path=tmp_path)).enter(SILO, release(round=1, turn=1)) == 1
    assert Ledger(Budget(path=tmp_path)).enter(SILO, release(run="another")) == 1
    assert len(Ledger(Budget(path=tmp_path)).releases("abc")) == 5
    assert Ledger(Budget(path=tmp_path)).releases("other") == []


def test_the_budget_holds_over_runs(tmp_path: Path) -> None:
    """Three releases of m = 2 fit, a fourth does not, and is not written down either."""
    ledger = Ledger(Budget(path=tmp_path, epsilon=spent([2.0] * 3, 1e-5) + 1e-6))
    for run in "abc":
        ledger.enter(SILO, release(run=run, partition=run))
    with pytest.raises(UserError, match=r"silo 'clinic': .* epsilon = 4.* ledger\.epsilon = 3"):
        ledger.enter(SILO, release(run="d", partition="d"))
    assert len(ledger.releases("abc")) == 3
    ledger.enter({"lab": "def"}, release(run="d", partition="d"))


def test_a_budget_is_for_one_unit(tmp_path: Path) -> None:
    Ledger(Budget(path=tmp_path)).enter(SILO, release())
    Ledger(Budget(path=tmp_path)).enter(SILO, release(unit="image"))
    with pytest.raises(UserError, match="by image and by text"):
        Ledger(Budget(path=tmp_path, epsilon=100.0)).enter(SILO, release())


def test_one_budget_of_several_silos_that_is_spent_spends_none_of_the_others(tmp_path: Path) -> None:
    ledger = Ledger(Budget(path=tmp_path, epsilon=spent([2.0], 1e-5) + 1e-6))
    ledger.enter({"b": "bbb"}, release())
    with pytest.raises(UserError, match="silo 'b'"):
        ledger.enter({"a": "aaa", "b": "bbb"}, release(partition="q"))
    assert ledger.releases("aaa") == []


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"format": 1}',
        '{"format": {"name": "fedcmp-ledger", "version": 1}, "releases": 3}',
        '{"format": {"name": "fedcmp-ledger", "version": 1}, "releases": [{"noise": 9}]}',
        '{"format": {"name": "fedcmp-ledger", "version": 2}, "releases": []}',
    ],
)
def test_a_damaged_ledger_ends_all_releases(tmp_path: Path, damage: str) -> None:
    (tmp_path / "abc.json").write_text(damage)
    with pytest.raises(UserError, match=r"abc\.json: not a ledger.* backup"):
        Ledger(Budget(path=tmp_path)).enter(SILO, release())


@pytest.mark.parametrize("noise", ["-1", "NaN", '"9"', "true"])
def test_a_release_that_was_tampered_with_is_seen(tmp_path: Path, noise: str) -> None:
    Ledger(Budget(path=tmp_path)).enter(SILO, release())
    path = tmp_path / "abc.json"
    path.write_text(path.read_text().replace('"noise": 2.0', f'"noise": {noise}'))
    with pytest.raises(UserError, match="not a ledger"):
        Ledger(Budget(path=tmp_path)).releases("abc")


def test_a_ledger_that_cannot_be_written_ends_all_releases(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"ledger\.path = .*file/sub: cannot be written"):
        Ledger(Budget(path=tmp_path / "file" / "sub")).enter(SILO, release())


WRITER = (
    "import sys\nfrom pathlib import Path\nfrom fedcmp.federate.privacy.ledger import Ledger, Release\n"
    "from fedcmp.pipeline.config import Ledger as Budget\n"
    "ledger = Ledger(Budget(path=Path(sys.argv[1])))\n"
    "for number in range(int(sys.argv[3])):\n"
    "    ledger.enter({'clinic': 'abc'}, Release(sys.argv[2], number, 'text', 'p', 0, 2.0))\n"
    "    print(number, flush=True)\n"
)


def test_processes_do_not_overwrite_each_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    workers = [subprocess.Popen([*command, name, "15"], cwd=ROOT, stdout=subprocess.DEVNULL) for name in "ab"]
    assert [worker.wait(timeout=180) for worker in workers] == [0, 0]
    assert len(Ledger(Budget(path=tmp_path)).releases("abc")) == 30


def test_whatever_was_answered_before_a_kill_is_counted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), "a", "1000000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        said = [int(worker.stdout.readline()) for _ in range(10)]
        worker.kill()
        said += [int(line) for line in worker.stdout.read().split()]
    counted = [each.round for each in Ledger(Budget(path=tmp_path)).releases("abc")]
    assert counted[: len(said)] == said
    assert len(counted) - len(said) in (0, 1)
    assert json.loads((tmp_path / "abc.json").read_text())["silo"] == "clinic"


def test_others_know_a_cache_by_a_name_that_only_its_machine_can_make(tmp_path: Path) -> None:
    here, there = (Ledger(Budget(path=tmp_path / name)) for name in ("here", "there"))
    name = here.pseudonym("abc")
    assert name == Ledger(Budget(path=tmp_path / "here")).pseudonym("abc")
    assert len({name, here.pseudonym("abd"), there.pseudonym("abc"), hashlib.sha256(b"abc").hexdigest()}) == 4
    assert (tmp_path / "here" / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Ledger(Budget(path=tmp_path / "file")).pseudonym("abc")
