"""Components are built before any work, and what was built is what decides a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT

from fedcmp.cli import main
from fedcmp.components import build, load
from fedcmp.extract.encoders.base import ENCODERS
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json, write_json
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.projectors.base import PROJECTORS
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.registry import Registry

TYPOS = {
    "federate.strategy={name='fedavg', proxmal=0.5}": "'federate.strategy.proxmal'; did you mean 'proximal'",
    "federate.strategy.name=fedagv": "no strategy is called 'fedagv'; did you mean 'fedavg'",
    "federate.projector={name='pixel_shuffle_mlp', scal=2}": "'federate.projector.scal'; did you mean",
    "federate.optimizer.momentm=0.5": "unknown key 'federate.optimizer.momentm'",
    "extract.encoder.pol=2": "unknown key 'extract.encoder.pol'; did you mean 'pool'",
    "extract.silos.lab.splt=test": "unknown key 'extract.silos.lab.splt'; did you mean 'split'",
    "evaluate.benchmarks.pope.max_tokens=3": "unknown key 'evaluate.benchmarks.pope.max_tokens'",
}
COMMANDS = ("extract", "federate", "evaluate", "score", "compare", "report", "plan", "export", "site")


def invoke(command: str, config: Path, *overrides: str) -> Result:
    words = [word for override in overrides for word in ("--set", override)]
    if command == "export":
        given = ["nowhere", "--to", "hf", "--out", "nowhere", "--config", str(config)]
        return CliRunner().invoke(main, [command, *given, *words])
    extra = ["--silo", "lab", "--superlink", "127.0.0.1:1", "--insecure"] if command == "site" else []
    return CliRunner().invoke(main, [command, str(config), *extra, *words])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("override", TYPOS)
def test_a_typo_anywhere_stops_every_command_at_once(
    workplace: Path, tmp_path: Path, command: str, override: str
) -> None:
    places = (f"features={tmp_path}/features", f"build={tmp_path}/build")
    result = invoke(command, workplace / "experiment.toml", override, *places)
    assert result.exit_code == 2
    assert TYPOS[override] in result.output
    assert result.output.count("\n") == 1
    assert not list(tmp_path.rglob("*.zarr*"))


def test_nothing_to_extract_imports_no_torch(extracted: Path) -> None:
    """The strategies need it; they are built only where an encoder is loaded, which needs it too."""
    # Other tests may have left caches that are looked through once more.
    assert CliRunner().invoke(main, ["extract", str(extracted)]).exit_code == 0
    code = (
        "import sys; from click.testing import CliRunner; from fedcmp.cli import main\n"
        f"result = CliRunner().invoke(main, ['extract', {str(extracted)!r}])\n"
        "assert 'Nothing to do' in result.output, result.output\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_shipped_configuration_can_be_built() -> None:
    for path in sorted((ROOT / "configs").glob("**/*.toml")):
        if "ablations" not in path.parts and path.stem != "base":
            load(path)


def written_out(registry: Registry, name: str) -> tuple[Component, Component]:  # type: ignore[type-arg]
    """A component with no option, and with all its defaults."""
    bare = Component(name=name)
    built = registry.build(bare, "here")
    options = {key: value for key, value in built.model_dump(mode="json").items() if key != "depth"}
    return bare, Component.model_validate({"name": name, **options})


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_a_strategy_is_what_was_built(name: str) -> None:
    bare, full = written_out(STRATEGIES, name)
    assert build("federate.strategy", bare) == build("federate.strategy", full)


@pytest.mark.parametrize("name", [name.replace("{depth}", "3") for name in PROJECTORS.names()])
def test_a_projector_is_what_was_built(name: str) -> None:
    bare, full = written_out(PROJECTORS, name)
    assert build("federate.projector", bare) == build("federate.projector", full)
    assert projectors.architecture_of(bare) == projectors.architecture_of(full)


def test_an_encoder_is_what_was_built(clip_dir: Path) -> None:
    bare = Component.model_validate({"name": "transformers", "path": str(clip_dir)})
    options = ENCODERS.build(bare, "here").model_dump(mode="json")
    full = Component.model_validate({"name": "transformers", **options})
    assert ENCODERS.build(bare, "here").identity() == ENCODERS.build(full, "here").identity()


DEFAULTS = (
    "federate.strategy.kappa=0.3",
    "federate.strategy.proximal=0.1",
    "federate.projector.name=mlp2x_gelu",
    "federate.micro_batch=4",
    "federate.clients_per_round=2",
    "federate.together=1",
    "federate.privacy={}",
    "federate.poison={}",
    "federate.communication={}",
    "federate.optimizer.momentum=0",
    "language.question_template=chat",
)
OTHERS = (
    "federate.strategy.kappa=0.4",
    "federate.projector.name=mlp3x_gelu",
    "federate.micro_batch=2",
    "federate.optimizer.momentum=0.5",
)


@pytest.fixture(scope="module")
def trained(extracted: Path) -> Path:
    result = invoke("federate", extracted, "run=kept", "federate.strategy.name=fedcmp")
    assert result.exit_code == 0, result.output
    return extracted.parent / "build/runs/study/kept"


def test_a_default_that_is_written_out_trains_and_answers_nothing_again(
    extracted: Path, trained: Path
) -> None:
    same = ("run=kept", "federate.strategy.name=fedcmp")
    assert invoke("evaluate", extracted, *same).exit_code == 0
    for default in DEFAULTS:
        assert "nothing to do" in invoke("federate", extracted, *same, default).output, default
    result = invoke("federate", extracted, *same, *DEFAULTS)
    assert "nothing to do" in result.output
    answered = ("evaluate.benchmarks.pope.silo=heldout", "evaluate.benchmarks.captions.silo=heldout")
    result = invoke("evaluate", extracted, *same, *DEFAULTS, *answered)
    assert "nothing to answer" in result.output


def test_identity_sees_what_is_another_run(extracted: Path) -> None:
    words = ["run=kept", "federate.strategy.name=fedcmp"]
    plain = run_identity(load(extracted, words))
    assert run_identity(load(extracted, [*words, *DEFAULTS])) == plain
    for other in OTHERS:
        assert run_identity(load(extracted, [*words, other])) != plain, other


def test_a_run_of_an_older_identity_is_trained_again_and_says_why(extracted: Path, tmp_path: Path) -> None:
    words = ("run=old", f"build={tmp_path}", "federate.rounds=0")
    assert invoke("federate", extracted, *words).exit_code == 0
    path = tmp_path / "runs/study/old/manifest.json"
    manifest = read_json(path)
    manifest["identity"]["format"]["version"] = 1
    write_json(path, manifest)
    refused = invoke("evaluate", extracted, *words)
    assert refused.exit_code == 2
    assert "another version of FedCMP" in refused.output
    again = invoke("federate", extracted, *words)
    assert "training again, because format: that of another version of FedCMP" in again.output
    assert "nothing to do" in invoke("federate", extracted, *words).output


@pytest.fixture
def swapped(extracted: Path, trained: Path) -> Path:
    """A finished run in whose projector's place another one was put."""
    out = trained.with_name("swapped")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(trained, out)
    result = invoke("federate", extracted, "run=other", "seed=5", "federate.rounds=1")
    assert result.exit_code == 0, result.output
    shutil.copy(trained.with_name("other") / "projector.safetensors", out)
    return out


def test_another_file_in_a_projectors_place_is_found_wherever_it_is_loaded(
    extracted: Path, swapped: Path, tmp_path: Path
) -> None:
    file = swapped / "projector.safetensors"
    right = read_json(swapped / "manifest.json")["projectors"][file.name]
    wrong = read_json(swapped.with_name("other") / "manifest.json")["projectors"][file.name]
    words = ("run=swapped", "federate.strategy.name=fedcmp")
    merged = ["merge", str(swapped), "--method", "fedavg", "--out", str(tmp_path / "merged.safetensors")]
    exported = ["export", str(swapped), "--to", "llava", "--out", str(tmp_path / "llava")]
    results = [
        invoke("evaluate", extracted, *words),
        invoke("federate", extracted, "run=started", f"federate.initial={swapped}"),
        CliRunner().invoke(main, merged),
        CliRunner().invoke(main, [*exported, "--config", str(extracted)]),
    ]
    for result in results:
        assert result.exit_code == 2, result.output
        line = result.output.splitlines()[-1]
        for part in (str(file), wrong[:12], right[:12], "put the right one back"):
            assert part in line


@pytest.mark.parametrize("damage", ["swapped", "lost", "cut"])
def test_the_remedy_works(extracted: Path, swapped: Path, trained: Path, damage: str) -> None:
    file = swapped / "projector.safetensors"
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    words = ("run=swapped", "federate.strategy.name=fedcmp")
    result = invoke("federate", extracted, *words)
    assert result.exit_code == 0, result.output
    assert "training again, because projector.safetensors is missing or not the one" in result.output
    assert file.read_bytes() == (trained / "projector.safetensors").read_bytes()
    assert "nothing to do" in invoke("federate", extracted, *words).output


def test_a_merged_projector_is_that_of_its_manifest(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    done = CliRunner().invoke(main, ["merge", str(trained), "--method", "fedavg", "--out", str(out)])
    assert done.exit_code == 0, done.output
    projectors.load_projector(out)
    manifest = json.loads(out.with_suffix(".json").read_text())
    manifest["projectors"]["merged.safetensors"] = "0" * 64
    write_json(out.with_suffix(".json"), manifest)
    with pytest.raises(UserError, match=r"but .*merged\.json says 000000000000"):
        projectors.load_projector(out)
