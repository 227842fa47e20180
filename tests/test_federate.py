from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.client.stream import Stream
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.options import Component


def run(config: Path, *overrides: str) -> Result:
    words = [word for override in overrides for word in ("--set", override)]
    return CliRunner().invoke(main, ["federate", str(config), *words])


def folder(config: Path, name: str) -> Path:
    return config.parent / "build/runs/study" / name


def projector_bytes(config: Path, name: str) -> bytes:
    return (folder(config, name) / "projector.safetensors").read_bytes()


def history(config: Path, name: str) -> list[dict]:
    lines = (folder(config, name) / "history.jsonl").read_text().splitlines()
    varying = ("seconds", "recalled")
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key not in varying} for row in rows]


@pytest.fixture(scope="module")
def caches(extracted: Path) -> dict[str, FeatureCache]:
    experiment = load(extracted)
    return {name: FeatureCache(experiment.cache_path(name)) for name in ("clinic", "lab")}


@pytest.fixture(scope="module")
def language(llama_dir: Path) -> FrozenLanguageModel:
    return FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")


def stream(caches, language, *, names=("clinic",), turns=3, batch_size=4, seed=0) -> Stream:  # type: ignore[no-untyped-def]
    chosen = {name: caches[name] for name in names}
    return Stream(
        chosen, language, template="plain", max_length=99, batch_size=batch_size, turns=turns, seed=seed
    )


@pytest.mark.parametrize("turns", [1, 3, 7])
@pytest.mark.parametrize("names", [("clinic",), ("clinic", "lab")])
def test_a_pass_takes_every_text_once(caches, language, names, turns: int) -> None:  # type: ignore[no-untyped-def]
    one = stream(caches, language, names=names, turns=turns)
    taken = np.concatenate([one.samples(turn) for turn in range(turns)])
    expected = [(silo, i) for silo, name in enumerate(names) for i in range(caches[name].texts)]
    assert sorted(map(tuple, taken.tolist())) == expected
    sizes = [len(list(one.batches(turn))) for turn in range(turns)]
    assert sizes == [one.steps(turn) for turn in range(turns)]
    assert one.size == len(expected)


def test_the_order_depends_on_seed_and_silo_alone(caches, language) -> None:  # type: ignore[no-untyped-def]
    orders = [
        stream(caches, language, seed=seed, names=names).samples(0).tolist()
        for seed, names in ((0, ("clinic",)), (0, ("clinic",)), (1, ("clinic",)), (0, ("lab",)))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_batches_pair_features_with_their_text(caches, language) -> None:  # type: ignore[no-untyped-def]
    one = stream(caches, language)
    cache, batch = caches["clinic"], next(one.batches(0))
    for row, (_, index) in enumerate(one.samples(0)[:4]):
        expected = cache.tensor([cache.text_image[index]])[0].float()
        assert torch.equal(batch.features[row], expected)


@pytest.mark.parametrize("name", ["fedavg", "fedcmp", "centralised", "local_only"])
def test_a_run_leaves_all_it_promises(extracted: Path, name: str) -> None:
    result = run(extracted, f"run={name}", f"federate.strategy.name={name}")
    assert result.exit_code == 0, result.output
    out = folder(extracted, name)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["strategy"] == name
    assert not (out / "checkpoint.pt").exists()
    rows = history(extracted, name)
    clients = ["all"] if name == "centralised" else ["clinic", "lab"]
    assert [(row["round"], row["client"]) for row in rows] == [
        (round_, client) for round_ in range(3) for client in [*clients, None]
    ]
    for row in rows:
        assert row["loss"] > 0
        assert row["tokens"] > row["samples"] > 0
        assert row["update_norm"] > 0
    per_client = [row for row in rows if row["client"]]
    assert sum(row["samples"] for row in per_client) == 38
    if name == "fedcmp":
        assert all(0 < row["reliability"] <= 1 for row in per_client)
    _, state = projectors.load_projector(out / "projector.safetensors")
    assert manifest["projectors"]["projector.safetensors"] == projectors.content_hash(state)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert sorted(path.name for path in out.rglob("silos/*")) == (
        ["clinic.safetensors", "lab.safetensors"] if name == "local_only" else []
    )
    again = run(extracted, f"run={name}", f"federate.strategy.name={name}")
    assert "nothing to do" in again.output


def test_centralised_is_fedavg_of_one_client_with_all_data(extracted: Path) -> None:
    """With one round, local_only's silo projectors averaged are FedAvg."""
    one_round = ("federate.rounds=1",)
    run(extracted, "run=one_avg", *one_round)
    run(extracted, "run=one_local", "federate.strategy.name=local_only", *one_round)
    assert projector_bytes(extracted, "one_avg") == projector_bytes(extracted, "one_local")


def test_same_config_same_bytes_and_a_changed_one_says_why(extracted: Path) -> None:
    for name in ("first", "second"):
        assert run(extracted, f"run={name}").exit_code == 0
    assert projector_bytes(extracted, "first") == projector_bytes(extracted, "second")
    result = run(extracted, "run=first", "seed=1")
    assert "training again, because seed: 1 here, 0 there" in result.output
    assert projector_bytes(extracted, "first") != projector_bytes(extracted, "second")
    for knob in ("device=cpu", "extract.workers=2", "evaluate.batch_size=7"):
        assert "nothing to do" in run(extracted, "run=second", knob).output


def test_no_rounds_keep_the_initial_projector(extracted: Path) -> None:
    assert run(extracted, "run=none", "federate.rounds=0").exit_code == 0
    projector = projectors.build(Component(name="mlp2x_gelu"), d_vision=24, d_llm=32)
    projectors.initialise(projector, torch.Generator().manual_seed(0))
    _, state = projectors.load_projector(folder(extracted, "none") / "projector.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in projector.state_dict().items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "federate.strategy.name=fedavgg",
            "federate.strategy.name: no strategy is called 'fedavgg'; did you mean",
        ),
        ("federate.strategy.sever_learning_rate=1", "did you mean 'server_learning_rate'?"),
        (
            "federate.projector.name=mlp",
            "federate.projector.name: no projector is called 'mlp'; known: linear",
        ),
        ("federate.silos=['clinic','labb']", "no silo 'labb' in extract.silos"),
        ("federate.silos=['clinic','labb']", "did you mean 'lab'?"),
        ("federate.silos=['clinic','clinic']", "names clinic more than once"),
        ("federate.silos='clinic'", "federate.silos = 'clinic': Input should be a valid list"),
        (
            "federate.silos=['clinic','heldout']",
            "silo heldout has no training text (12 texts of other splits",
        ),
    ],
)
def test_wrong_components_are_named(extracted: Path, override: str, message: str) -> None:
    result = run(extracted, "run=wrong", "federate.strategy.name=fedavg", override)
    assert result.exit_code == 2
    assert message in result.output


def test_any_strategy_can_be_given_path_updates_but_personal_ones(extracted: Path) -> None:
    """The same local steps are taken, and another projector is sent of them."""
    for name, update in (("weights", "weights"), ("path", "path"), ("again", "path")):
        options = (f"run=sends-{name}", "federate.strategy.name=fedavg", f"federate.strategy.update={update}")
        assert run(extracted, *options).exit_code == 0
    losses = {
        name: [row["loss"] for row in history(extracted, f"sends-{name}") if row["round"] == 0]
        for name in ("weights", "path")
    }
    assert losses["weights"] == losses["path"]
    assert projector_bytes(extracted, "sends-path") == projector_bytes(extracted, "sends-again")
    assert projector_bytes(extracted, "sends-path") != projector_bytes(extracted, "sends-weights")
    result = run(extracted, "run=odd", "federate.strategy={name='local_only', update='path'}")
    assert result.exit_code == 2
    assert "federate.strategy.update = 'path': with strategy 'local_only' clients go on" in result.output


def test_more_rounds_than_texts(extracted: Path) -> None:
    result = run(extracted, "run=many", "federate.rounds=19")
    assert result.exit_code == 2
    assert "silo lab: 18 training texts do not fill its 19 rounds; lower federate.rounds" in result.output


@pytest.mark.parametrize(
    "options",
    [
        ["federate.strategy.name=fedcmp"],
        ["federate.strategy.name=local_only", "federate.optimizer.carry=true"],
    ],
    ids=["fedcmp", "local_only"],
)
def test_killed_and_rerun_ends_in_the_same_bytes(extracted: Path, options: list[str], tmp_path: Path) -> None:
    """`kill -9` after a round's checkpoint; the rerun continues there."""
    options = [*options, "federate.rounds=9", "federate.batch_size=1", f"build={tmp_path}"]
    words = [word for option in options for word in ("--set", option)]
    command = [sys.executable, "-m", "fedcmp", "federate", str(extracted), *words]
    process = subprocess.Popen([*command, "--set", "run=killed"], cwd=ROOT, stdout=subprocess.DEVNULL)
    out = tmp_path / "runs/study/killed"
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    with (out / "history.jsonl").open("a") as file:
        file.write('{"round": 99, "half a li')
    resumed = CliRunner().invoke(main, ["federate", str(extracted), *words, "--set", "run=killed"])
    assert resumed.exit_code == 0, resumed.output
    assert "continuing after round" in resumed.output
    whole = CliRunner().invoke(main, ["federate", str(extracted), *words, "--set", "run=whole"])
    assert whole.exit_code == 0
    for file in sorted(out.rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "runs/study/whole" / file.relative_to(out)).read_bytes()

    def rows(name: str) -> list[dict]:
        lines = (tmp_path / "runs/study" / name / "history.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert rows("killed") == rows("whole")


def test_a_checkpoint_of_another_config_is_not_taken(extracted: Path) -> None:
    run(extracted, "run=plain")
    out = folder(extracted, "stale")
    out.mkdir(parents=True)
    torch.save({"fingerprint": "other", "state": {}}, out / "checkpoint.pt")
    assert run(extracted, "run=stale").exit_code == 0
    assert projector_bytes(extracted, "stale") == projector_bytes(extracted, "plain")


def test_a_damaged_checkpoint_is_one_line(extracted: Path) -> None:
    out = folder(extracted, "damaged")
    out.mkdir(parents=True)
    (out / "checkpoint.pt").write_bytes(b"garbage")
    result = run(extracted, "run=damaged")
    assert result.exit_code == 2
    assert "damaged/checkpoint.pt: damaged, not a checkpoint; delete it" in result.output


def test_a_corrupt_cache_is_never_trained_on(extracted: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(extracted.parent / "features", tmp_path / "features")
    shard = tmp_path / "features/lab.zarr/features/patch/c/1/0/0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    result = run(extracted, "run=corrupt", f"features={tmp_path}/features")
    assert result.exit_code == 2
    assert "lab.zarr" in result.output
    assert "features/patch/c/1/0/0" in result.output
    assert "checksum" in result.output
    assert not (folder(extracted, "corrupt") / "manifest.json").exists()


def test_silos_take_turns_and_still_pass_once_over_their_data(extracted: Path) -> None:
    words = ["federate.rounds=6", "federate.clients_per_round=1"]
    assert run(extracted, "run=turns", *words).exit_code == 0
    rows = [row for row in history(extracted, "turns") if row["client"]]
    assert [row["round"] for row in rows] == list(range(6))
    samples = {
        name: sum(row["samples"] for row in rows if row["client"] == name) for name in ("clinic", "lab")
    }
    assert samples == {"clinic": 20, "lab": 18}
    assert sorted(row["client"] for row in rows) == ["clinic"] * 3 + ["lab"] * 3


def test_who_would_never_take_part_is_named(extracted: Path) -> None:
    result = run(extracted, "run=never", "federate.rounds=1", "federate.clients_per_round=1")
    assert result.exit_code == 2
    assert re.search(r"clients_per_round = 1: (clinic|lab) would never take part in 1 rounds", result.output)
    words = ("federate.strategy.name=local_only", "federate.clients_per_round=1")
    result = run(extracted, "run=lonely", *words)
    assert result.exit_code == 2
    assert "silos that train alone take part in every round" in result.output


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fedprox", "pivotmerge", "fedcmp", "fedadam"])
def test_a_killed_run_goes_on_whatever_the_strategy_remembers(extracted: Path, name: str) -> None:
    """Interrupted after every round by a history that cannot be written, as on a full disk."""
    words = [f"federate.strategy.name={name}", "federate.together=2", "federate.clients_per_round=2"]
    assert run(extracted, f"run=whole_{name}", *words).exit_code == 0

    class Killed(BaseException):
        pass

    from fedcmp.federate.server import rounds as server

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "Progress", _killed_after_saving(server.Progress, Killed))
            with pytest.raises(Killed):
                CliRunner().invoke(
                    main,
                    ["federate", str(extracted), "--set", f"run=parts_{name}"]
                    + [word for each in words for word in ("--set", each)],
                    standalone_mode=False,
                    catch_exceptions=False,
                )
    assert run(extracted, f"run=parts_{name}", *words).exit_code == 0
    assert projector_bytes(extracted, f"parts_{name}") == projector_bytes(extracted, f"whole_{name}")
    assert history(extracted, f"parts_{name}") == history(extracted, f"whole_{name}")


def _killed_after_saving(progress: type, error: type[BaseException]) -> type:
    class Killed(progress):  # type: ignore[misc, valid-type]
        def save(self, path: Path, fingerprint: str) -> None:
            super().save(path, fingerprint)
            raise error

    return Killed


def test_a_changed_default_of_a_strategy_trains_again(
    extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not written in the configuration decides the projector, too."""
    words = ("run=defaults", "federate.strategy.name=fedavgm")
    assert run(extracted, *words).exit_code == 0
    assert "nothing to do" in run(extracted, *words).output

    class Changed(STRATEGIES._classes["fedavgm"]):  # type: ignore[misc]
        momentum: float = 0.123

    monkeypatch.setitem(STRATEGIES._classes, "fedavgm", Changed)
    assert "training again, because federate.strategy.momentum: 0.123 here" in run(extracted, *words).output


def test_an_aggregate_that_is_not_finite_ends_the_run_in_one_line(extracted: Path) -> None:
    words = ("federate.strategy.name=fedavg", "federate.strategy.server_learning_rate=1e300")
    result = run(extracted, "run=far", "federate.rounds=1", *words)
    assert result.exit_code == 2
    assert "round 0: the aggregated linear_1.weight is not finite; lower" in result.output
    assert not (folder(extracted, "far") / "manifest.json").exists()
