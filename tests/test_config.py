from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT

from fedcmp.ablation.file import grid, read_ablation, trial
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.options import Component, Options
from fedcmp.pipeline.registry import Registry
from fedcmp.pipeline.toml import load
from fedcmp.pipeline.world.scenarios import SCENARIOS


def test_every_shipped_config_is_valid() -> None:
    paths = [ROOT / "configs/demo.toml", *(ROOT / "configs/demo").glob("*.toml")]
    paths += [ROOT / "configs/pictograms.toml", *(ROOT / "configs/pictograms").glob("*.toml")]
    paths += [path for path in (ROOT / "configs/scenarios").glob("*.toml") if path.stem != "base"]
    assert len(paths) >= 10
    for path in paths:
        assert load(path).run == path.stem


def written() -> set[str]:
    """What `make ablate` writes data for: scenarios of the world, or others with options of their own."""
    rules = (ROOT / "configs/ablations.mk").read_text()
    found = re.search(r"^SCENARIOS := (.*)$", rules, re.MULTILINE)
    others = dict(re.findall(r"^DATA_(\w+) := --scenario (\w+)", rules, re.MULTILINE))
    assert found
    names = set(found[1].split())
    assert {others.get(name, name) for name in names} <= SCENARIOS.keys()
    assert "$(filter align-%,$(EXPERIMENTS))" in rules
    return names | {"demo", "align"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_ablation_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ablation = read_ablation(path)
    for scenario, strategy in product(ablation.scenarios, ablation.strategies):
        for options in grid(ablation, strategy):
            experiment = trial(ablation, scenario, strategy, 3, options).experiment
            assert experiment.experiment in {f"{name}-3" for name in written()}
            # Features of another layer of the encoder lie elsewhere.
            folder = "build/robust/layer/features" if scenario == "layer" else "build/features"
            assert str(experiment.features) == f"{folder}/{experiment.experiment}"
            STRATEGIES.build(experiment.federate.strategy, "federate.strategy")


def test_placeholders_are_filled_in(tmp_path: Path) -> None:
    text = (ROOT / "configs/demo.toml").read_text().replace('experiment = "demo"', 'experiment = "e{seed}"')
    path = tmp_path / "x.toml"
    path.write_text(text.replace('features = "build/features/demo"', 'features = "f/{experiment}/{seed}"'))
    experiment = load(path, ["seed=7"])
    assert (experiment.experiment, str(experiment.features)) == ("e7", "f/e7/7")
    assert experiment.evaluate.benchmarks["vqa"].model_extra["image_name"] == "{image_id:06d}.png"  # type: ignore[index]


def test_extends_merges_and_a_new_name_replaces(tmp_path: Path) -> None:
    base = (ROOT / "configs" / "demo.toml").read_text()
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "run.toml").write_text(
        'extends = "base.toml"\n[federate]\nrounds = 7\n'
        '[federate.strategy]\nname = "fedcmp"\nkappa = 0.5\n[extract.silos.flat]\nsplit = "test"\n'
    )
    (tmp_path / "child.toml").write_text('extends = "run.toml"\n[federate.strategy]\nname = "fedavg"\n')
    run, child = load(tmp_path / "run.toml"), load(tmp_path / "child.toml")
    assert run.federate.rounds == child.federate.rounds == 7
    assert run.federate.strategy.model_extra == {"kappa": 0.5}
    assert child.federate.strategy.model_extra == {}
    flat = run.extract.silos["flat"].model_extra
    assert flat == {"path": "build/world/silos/flat/*.tar", "split": "test"}
    assert (run.run, child.run) == ("run", "child")


def test_circular_extends(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(UserError, match="circle"):
        load(tmp_path / "a.toml")


def test_overrides_are_toml_or_text() -> None:
    demo = ROOT / "configs" / "demo.toml"
    changed = load(demo, ["federate.rounds=3", "run=other", "federate.silos=['flat']"])
    assert (changed.federate.rounds, changed.run, changed.federate.silos) == (3, "other", ("flat",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federate.ronds=3", r"unknown key 'federate.ronds'; did you mean 'rounds'"),
        ("federate.rounds=-1", r"federate.rounds = -1: .*greater than or equal to 0"),
        ("federate.optimizer.name=adam", r"federate.optimizer.name = 'adam'"),
        ("run=../escape", r"run = '../escape'"),
        ("federate.optimizer.learning_rate=nan", r"learning_rate"),
    ],
)
def test_wrong_values_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(ROOT / "configs" / "demo.toml", [override])


def test_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


def test_registry_refuses_a_second_of_the_same_name() -> None:
    registry: Registry[Options] = Registry("thing", "fedcmp.federate.strategies")

    @registry.register("one")
    class One(Options):
        size: int = 1

    class Two(Options):
        pass

    assert registry.build(Component(name="one", size=3), "here") == One(size=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"unknown key 'here.sise'; did you mean 'size'"):
        registry.build(Component(name="one", sise=3), "here")  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"here.name: no thing is called 'on'; did you mean 'one'"):
        registry.build(Component(name="on"), "here")
    registry.register("one")(Two)
    registry.register("two")(Two)
    with pytest.raises(UserError, match=r"here.name: thing 'one' is registered twice, by .*One and .*Two"):
        registry.build(Component(name="one"), "here")
    assert registry.build(Component(name="two"), "here") == Two()
