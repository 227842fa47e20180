"""Bad sites, and what is done about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_sites import projector, sites_config  # noqa: F401
from test_strategies import draw

from fedcmp.components import load
from fedcmp.federate.arithmetic.updates import distance
from fedcmp.federate.engines.local import LocalEngine
from fedcmp.federate.outgoing.poison import poisoned
from fedcmp.federate.run import run
from fedcmp.pipeline.config import Poison
from fedcmp.pipeline.errors import UserError


def test_what_bad_sites_send() -> None:
    start, state = draw(0), draw(1)
    norm = distance(state, start)

    def sent(kind: str, scale: float = 1.0, round_: int = 0) -> dict[str, torch.Tensor]:
        return poisoned(start, state, Poison(kind=kind, scale=scale), 0, "a", round_)  # type: ignore[arg-type]

    assert sent("captions") is state
    for name, old in start.items():
        update = state[name] - old
        assert torch.allclose(sent("scaled", 10)[name] - old, 10 * update, atol=1e-5)
        assert torch.allclose(sent("sign_flipped", 2)[name] - old, -2 * update, atol=1e-5)
        assert torch.isnan(sent("not_finite")[name]).all()
        assert torch.equal(sent("random")[name], sent("random")[name])
        assert not torch.equal(sent("random")[name], sent("random", round_=1)[name])
    assert distance(sent("random", 3), start) == pytest.approx(3 * norm, rel=1e-4)


@pytest.mark.parametrize("secure", ["false", "true"])
def test_updates_that_are_no_numbers_are_refused_by_name(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
    secure: str,
) -> None:
    options = [
        "federate.poison.lab.kind=not_finite",
        f"federate.privacy.secure={secure}",
        f"build={tmp_path}",
    ]
    with pytest.raises(UserError, match="client 'lab'"):
        run(load(sites_config, options))


def test_with_a_quorum_rounds_go_on_without_them(sites_config: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    """As if the client had not answered."""
    options = [f"build={tmp_path}", "federate.strategy.name=fedcmp"]
    bad = load(sites_config, [*options, "run=bad", "sites.quorum=2", "federate.poison.lab.kind=not_finite"])
    run(bad)
    assert (
        "round 2 goes on without it: client 'lab' sent values that are not finite" in capsys.readouterr().out
    )
    rows = map(json.loads, (bad.run_path / "history.jsonl").read_text().splitlines())
    assert [row["missing"] for row in rows if row["client"] is None] == [["lab"]] * 3

    class Without(LocalEngine):
        @contextmanager
        def training(self, start: int) -> Iterator[object]:  # type: ignore[override]
            with super().training(start) as train:
                yield lambda jobs: train([job for job in jobs if job.client != "lab"])

    others = load(sites_config, [*options, "run=others"])
    run(others, Without)
    assert projector(bad) == projector(others)


def test_bad_captions_change_what_is_learnt_and_only_there(sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    """The memo keeps both apart; an honest site learns the same beside a bad one."""
    options = [f"build={tmp_path}", f"memo.path={tmp_path}/memo", "federate.strategy.name=local_only"]
    honest = load(sites_config, [*options, "run=honest"])
    bad = load(sites_config, [*options, "run=bad", "federate.poison.lab.kind=captions"])
    run(honest)
    run(bad)
    for silo, same in (("clinic", True), ("lab", False), ("practice", True)):
        files = [(each.run_path / f"silos/{silo}.safetensors").read_bytes() for each in (honest, bad)]
        assert (files[0] == files[1]) is same
    assert projector(honest) != projector(bad)


def test_a_poisoned_silo_must_be_one(sites_config: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="poison names nobody, which are none of the silos"):
        load(sites_config, ["federate.poison.nobody.kind=random"])
