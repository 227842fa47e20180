"""Components from outside the package: in files that experiments name, and in installed packages."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.engines.service import Service
from fedcmp.federate.strategies import STRATEGIES
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.hashes import sha256_file
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.toml import load as load_toml

HALF = """
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Strategy, mean_update, moved


@STRATEGIES.register("half")
class Half(Strategy):
    rate: float = 0.5

    def aggregate(self, state, updates, memory):
        return Aggregate(moved(state, mean_update(state, updates), self.rate), memory)
"""
BENCHMARK = """
from fedcmp.evaluate.benchmarks import BENCHMARKS, Benchmark, Item, averaged, question


@BENCHMARKS.register("lengths")
class Lengths(Benchmark):
    version = 1
    headlines = ("words",)

    def items(self, cache):
        return [Item(image, image, question("What is this?"), "") for image in cache.ids]

    def score(self, items, answers):
        return {"words": averaged(items, [float(len(answers[item.id].split())) for item in items])}
"""
SOURCE = """
from fedcmp.extract.sources import SOURCES
from fedcmp.extract.sources.llava_json import LlavaJson


@SOURCES.register("first_ten")
class FirstTen(LlavaJson):
    def records(self):
        yield from list(super().records())[:10]
"""
ENCODER = """
from fedcmp.extract.encoders import ENCODERS, Encoder


@ENCODERS.register("grid")
class Grid(Encoder):
    def identity(self):
        return {"name": "grid"}

    def load(self, device, dtype):
        raise NotImplementedError
"""
PROJECTOR = """
from torch import nn

from fedcmp.pipeline.models.projectors import PROJECTORS, Architecture, Projector


class ScaledProjector(Projector):
    def __init__(self, d_vision, d_llm, scale):
        super().__init__(d_vision, d_llm)
        self.scale, self.linear = scale, nn.Linear(d_vision, d_llm)

    def forward(self, features):
        return self.scale * self.linear(features)


@PROJECTORS.register("scaled")
class Scaled(Architecture):
    scale: float = 2.0

    def module(self, d_vision, d_llm):
        return ScaledProjector(d_vision, d_llm, self.scale)

    def widths(self, state):
        return tuple(state["linear.weight"].shape)[::-1]
"""


def write(folder: Path, base: Path, lines: str, name: str = "run.toml") -> Path:
    """An experiment over caches that are there, with results of its own."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(f'extends = "{base}"\nbuild = "{folder}/build"\n{lines}\n')
    return path


def half(folder: Path, base: Path, code: str = HALF) -> Path:
    config = write(folder, base, 'plugins = ["half.py"]\nfederate.strategy.name = "half"')
    (folder / "half.py").write_text(code)
    return config


def fine(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    return result.output.splitlines()[-1]


def rate(experiment: Experiment) -> float:
    return STRATEGIES.build(experiment.federate.strategy, "federate.strategy").rate  # type: ignore[attr-defined]


def test_paths_count_from_the_file_that_names_them(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write(tmp_path / "base", workplace / "experiment.toml", 'plugins = ["a.py"]')
    run = write(tmp_path / "runs", Path("../base/run.toml"), 'plugins = ["b.py", "../base/a.py"]')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = load_toml(run, ['plugins=["c.py"]']).plugins
    assert found == tuple(tmp_path / name for name in ("base/a.py", "runs/b.py", "here/c.py"))
    assert load_toml(base).plugins == (tmp_path / "base/a.py",)
    with pytest.raises(UserError, match=r"plugins = 'c.py': .*list"):
        load_toml(run, ["plugins=c.py"])


def test_what_show_prints_has_the_same_plugins(workplace: Path, tmp_path: Path) -> None:
    config = half(tmp_path, workplace / "experiment.toml")
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere/copy.toml"
    copy.write_text(fine("show", config))
    assert "rate = 0.5\n" in copy.read_text()
    assert load(copy).federate.strategy.as_built() == load(config).federate.strategy.as_built()


def test_make_knows_the_files(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = half(tmp_path, workplace / "experiment.toml")
    monkeypatch.chdir(tmp_path)
    words = ("show", config, "--make", "--set", 'plugins=["missing.py"]')
    lines = dict(line.split(" := ") for line in fine(*words).splitlines())
    assert lines["FILES"].split()[-1] == "half.py"
    assert lines["files_run"].split()[-1] == "half.py"


BROKEN = {
    "def (": r"odd.py cannot be loaded: line 1: SyntaxError: ",
    "\n\nimport nothing_of_this_name": r"odd.py cannot be loaded: line 3: ModuleNotFoundError: No module",
    "import sys\nsys.exit()": r"odd.py cannot be loaded: line 2: SystemExit",
    "x = 1": r"odd.py registers nothing; write @STRATEGIES.register",
    None: r"odd.py cannot be read: No such file or directory; correct the path",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_plugin_breaks_no_other(workplace: Path, tmp_path: Path, code: str | None) -> None:
    lines = 'plugins = ["odd.py", "half.py"]\nfederate.strategy.name = "half"'
    config = write(tmp_path, workplace / "experiment.toml", lines)
    (tmp_path / "half.py").write_text(HALF)
    if code is not None:
        (tmp_path / "odd.py").write_text(code)
    assert rate(load(config)) == 0.5
    message = refused("federate", config, "--set", "federate.strategy.name=odd")
    assert "federate.strategy.name: no strategy is called 'odd'" in message
    assert f"; plugin {tmp_path}/{BROKEN[code]}" in message
    assert "did you mean 'half'" in refused("federate", config, "--set", "federate.strategy.name=hafl")


WRONG = {
    "return None": "line|aggregate returned NoneType, not Aggregate",
    "return Aggregate({}, memory)": "aggregate returned a state with other keys: linear_1.bias",
    "return Aggregate({k: v.double() for k, v in state.items()}, memory)": "float64 .*, not torch.float32",
    "return Aggregate(state, memory, {'loss': {}})": "a figure is called 'loss', as one of the history's own",
    "return state['nothing']": r"line \d+: KeyError: 'nothing'",
}


@pytest.mark.parametrize("code", WRONG)
def test_what_a_strategy_returns_is_checked(extracted: Path, tmp_path: Path, code: str) -> None:
    text = re.sub(r"(?m)^        return .*$", f"        {code}", HALF)
    assert code in text
    message = refused("federate", half(tmp_path, extracted, text))
    assert re.search(WRONG[code], message), message
    assert f"{tmp_path}/half.py: " in message


def test_what_a_merge_method_returns_is_checked(extracted: Path, tmp_path: Path) -> None:
    plugin = half(tmp_path, extracted, re.sub(r"(?m)^        return .*$", "        return None", HALF))
    fine("federate", plugin, "--set", "federate.rounds=0", "--set", "federate.strategy.name=fedavg")
    (projector,) = tmp_path.rglob("projector.safetensors")
    out = ("--out", str(tmp_path / "merged.safetensors"))
    other = tmp_path / "other.safetensors"
    other.write_bytes(projector.read_bytes())
    words = ("merge", projector, other, "--method", "half", "--plugin", tmp_path / "half.py", *out)
    message = refused(*words)
    assert f"--method half: {tmp_path}/half.py: " in message
    assert "aggregate returned NoneType, not Aggregate" in message


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("[0][1]", r"benchmark 'own': .*/own\.py: line \d+: IndexError"),
        ("open('nothing.csv')", "benchmark 'own': nothing.csv: No such file or directory; correct its path"),
    ],
)
def test_a_benchmark_that_fails_stops_no_other(extracted: Path, tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "own.py").write_text(
        "from fedcmp.evaluate.benchmarks import BENCHMARKS, Benchmark\n\n\n"
        "@BENCHMARKS.register('own')\nclass Own(Benchmark):\n    version = 1\n\n"
        f"    def items(self, cache):\n        return {code}\n\n"
        "    def score(self, items, answers):\n        return {}\n"
    )
    lines = 'plugins = ["own.py"]\nevaluate.benchmarks.own = { name = "own" }\nfederate.rounds = 0'
    config = write(tmp_path, extracted, lines)
    assert CliRunner().invoke(main, ["federate", str(config)]).exit_code == 0
    result = CliRunner().invoke(main, ["evaluate", str(config), "--benchmark", "own", "--benchmark", "loss"])
    assert result.exit_code == 2
    assert re.search(said, result.output), result.output
    assert "loss: loss" in result.output
    assert "1 of 2 benchmarks failed" in result.output


def test_a_name_that_is_registered_twice_says_where(workplace: Path, tmp_path: Path) -> None:
    config = half(tmp_path, workplace / "experiment.toml")
    other = tmp_path / "other.py"
    other.write_text(HALF.replace('"half"', '"fedavg"') + HALF)
    named = ("--set", f'plugins=["{other}"]')
    message = refused("federate", config, *named)
    assert f"strategy 'half' is registered twice, by {tmp_path}/half.py and {other}; rename one" in message
    message = refused("federate", config, *named, "--set", "federate.strategy.name=fedavg")
    assert f"'fedavg' is registered twice, by fedcmp.federate.strategies.fedavg.FedAvg and {other}" in message
    other.write_text(HALF.replace('"half"', '"mlp2x_gelu"'))  # of another kind
    assert rate(load(config, named[1:])) == 0.5
    other.write_text(PROJECTOR.replace('"scaled"', '"mlp2x_gelu"'))
    assert "by fedcmp.pipeline.models.projectors.mlp.Mlp and" in refused("federate", config, *named)


def test_a_plugin_serves_its_own_experiments_alone(workplace: Path, tmp_path: Path) -> None:
    base = workplace / "experiment.toml"
    ours = load(half(tmp_path / "a", base))
    theirs = load(half(tmp_path / "b", base, HALF.replace("0.5", "0.25")))
    assert (rate(ours), rate(theirs)) == (0.5, 0.25)
    assert "half" not in STRATEGIES.names()
    with pytest.raises(UserError, match="no strategy is called 'half'"):
        load(base, ["federate.strategy.name=half"])


def test_several_components_in_a_file_that_imports_ours(workplace: Path, tmp_path: Path) -> None:
    """Modules of ours that a plugin is the first to import register for everybody."""
    (tmp_path / "both.py").write_text(HALF + BENCHMARK + SOURCE + PROJECTOR)
    lines = 'plugins = ["both.py"]\nfederate.strategy.name = "half"\nfederate.projector.name = "scaled"'
    config = write(tmp_path, workplace / "experiment.toml", lines)
    code = (
        "import sys, pathlib\nfrom fedcmp.components import load\n"
        "words = ['evaluate.benchmarks.words={name=\"lengths\"}']\n"
        "experiment = load(pathlib.Path(sys.argv[1]), words)\n"
        "from fedcmp.extract.sources import SOURCES\n"
        "assert 'llava_json' in SOURCES.names() and 'first_ten' not in SOURCES.names()\n"
        "print(len(experiment.evaluate.benchmarks['words'].provenance))"
    )
    assert python(code, config) == "1\n"


def python(code: str, *words: object, path: Path = ROOT, **options: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, dict.fromkeys((ROOT, path))))}
    command = [sys.executable, "-c", code, *map(str, words)]
    result = subprocess.run(command, capture_output=True, env=environment, cwd=path, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stderr.decode()
    return str(result.stdout.decode())


def test_other_processes_run_what_was_read(workplace: Path, tmp_path: Path) -> None:
    config = half(tmp_path, workplace / "experiment.toml")
    sent = pickle.dumps(load(config))
    (tmp_path / "half.py").write_text("changed meanwhile")
    code = (
        "import pickle, sys\nexperiment = pickle.load(sys.stdin.buffer)\n"
        "from fedcmp.federate.strategies import STRATEGIES\n"
        "strategy = experiment.federate.strategy\n"
        "print(STRATEGIES.build(strategy, '').rate, strategy.as_built()['plugin file'])"
    )
    hashed = load(half(tmp_path, workplace / "experiment.toml")).federate.strategy.as_built()["plugin file"]
    assert python(code, input=sent) == f"0.5 {hashed}\n"


def test_only_what_comes_from_a_plugin_holds_its_hash(workplace: Path, tmp_path: Path) -> None:
    base = workplace / "experiment.toml"
    config = half(tmp_path, base)
    plain = load(base)
    named = load(base, [f'plugins=["{tmp_path}/half.py", "{tmp_path}/missing.py"]'])
    assert run_identity(named) == run_identity(plain)
    assert "plugin" not in json.dumps(run_identity(plain))
    built = load(config).federate
    assert built.strategy.as_built() == {
        "name": "half",
        "update": "weights",
        "proximal": 0.0,
        "rate": 0.5,
        "plugin file": sha256_file(tmp_path / "half.py"),
    }
    assert built.projector.as_built() == plain.federate.projector.as_built()


def test_a_changed_strategy_trains_again_and_says_why(extracted: Path, tmp_path: Path) -> None:
    config = half(tmp_path, extracted)
    fine("federate", config)
    first = (tmp_path / "build/runs/study/run/projector.safetensors").read_bytes()
    assert "nothing to do" in fine("federate", config)
    half(tmp_path, extracted, HALF + "\n# of the same arithmetic\n")
    assert "federate.strategy.plugin file: " in refused("evaluate", config)
    assert "training again, because federate.strategy.plugin file: " in fine("federate", config)
    assert (tmp_path / "build/runs/study/run/projector.safetensors").read_bytes() == first
    half(tmp_path, extracted, HALF.replace("self.rate)", "2 * self.rate)"))
    assert "training again" in fine("federate", config)
    assert (tmp_path / "build/runs/study/run/projector.safetensors").read_bytes() != first


def test_scores_of_a_changed_benchmark_are_stale(extracted: Path, tmp_path: Path) -> None:
    lines = 'plugins = ["b.py"]\nfederate.rounds = 0\nevaluate.benchmarks = { words = { name = "lengths" } }'
    config = write(tmp_path, extracted, lines)
    (tmp_path / "b.py").write_text(BENCHMARK)
    fine("federate", config)
    fine("evaluate", config, "--benchmark", "words")
    scores = tmp_path / "build/scores/study/run/words.json"
    assert read_json(scores)["made_of"]["plugin file"] == sha256_file(tmp_path / "b.py")
    before = read_json(scores)["metrics"]["words"]["value"]
    (tmp_path / "b.py").write_text(BENCHMARK.replace("float(len", "2 * float(len"))
    message = refused("report", config)
    assert "scores of 'words' are stale (plugin file: " in message
    fine("score", config, "--benchmark", "words")
    assert read_json(scores)["metrics"]["words"]["value"] == 2 * before
    assert "nothing to answer" in fine("evaluate", config, "--benchmark", "words")


def test_caches_hold_the_plugins_of_encoder_and_source(workplace: Path, tmp_path: Path) -> None:
    lines = 'plugins = ["s.py", "e.py"]\nfeatures = "FEATURES"\nfederate.silos = ["clinic"]'
    config = write(tmp_path, workplace / "experiment.toml", lines.replace("FEATURES", f"{tmp_path}/features"))
    encoder = "from fedcmp.extract.encoders import ENCODERS\n"
    encoder += "from fedcmp.extract.encoders.transformers import Transformers\n"
    encoder += '@ENCODERS.register("own")\nclass Own(Transformers):\n    pass\n'
    (tmp_path / "s.py").write_text(SOURCE)
    (tmp_path / "e.py").write_text(encoder)
    clinic = f'{{name="first_ten", path="{workplace}/clinic/pairs.json", images="{workplace}/clinic"}}'
    options = load(workplace / "experiment.toml").extract.encoder.model_extra or {}
    path = options["path"]
    words = ("extract", config, "--silo", "clinic", "--set", f"extract.silos.clinic={clinic}")
    words += ("--set", f'extract.encoder={{name="own", path="{path}", pool=2}}')
    fine(*words)
    manifest = tmp_path / "features/clinic.zarr/manifest.json"
    assert read_json(manifest)["images"] == 10
    assert read_json(manifest)["key"]["encoder"]["plugin file"] == sha256_file(tmp_path / "e.py")
    assert read_json(manifest)["source"]["plugin file"] == sha256_file(tmp_path / "s.py")
    assert "Nothing to do" in fine(*words)
    (tmp_path / "s.py").write_text(SOURCE.replace(":10", ":7"))
    assert "encoding again, because plugin file: " in fine(*words)
    assert read_json(manifest)["images"] == 7
    (tmp_path / "e.py").write_text(encoder + "# changed\n")
    message = refused(*words)
    assert "differ in encoder.plugin file: " in message
    assert "--overwrite" in message
    fine(*words, "--overwrite")
    assert "Nothing to do" in fine(*words)
    # Our own encoder gives the same features, but that is nothing anybody can see from outside.
    ours = f'extract.encoder={{name="transformers", path="{path}", pool=2}}'
    assert "encoder.plugin file" in refused(*words, "--set", ours)


def test_a_site_refuses_a_server_with_another_plugin(extracted: Path, tmp_path: Path) -> None:
    ours = load(half(tmp_path / "site", extracted))
    theirs = load(half(tmp_path / "server", extracted, HALF + "# changed\n"))
    same = load(half(tmp_path / "other", extracted))
    site = Service(ours, "clinic")
    for experiment in (same, theirs):
        asked = Service(experiment, "clinic").handle({"kind": "hello"})["terms"]
        request = {"kind": "train", "silo": "clinic", "terms": asked, "job": None}
        if experiment is same:
            with pytest.raises(TypeError):  # agreed, but there is no job
                site.handle(request)
        else:
            with pytest.raises(UserError, match=r"not agreed to .federate\.strategy\.plugin file: "):
                site.handle(request)


def test_a_projector_of_a_plugin_is_loaded_wherever_its_experiment_is_known(
    extracted: Path, tmp_path: Path
) -> None:
    lines = 'plugins = ["p.py"]\nfederate.projector = { name = "scaled", scale = 3.0 }'
    config = write(tmp_path, extracted, lines)
    (tmp_path / "p.py").write_text(PROJECTOR)
    fine("federate", config)
    assert "nothing to do" in fine("federate", config)
    fine("evaluate", config, "--benchmark", "pope")
    run = tmp_path / "build/runs/study/run"
    fine("federate", config, "--set", "run=further", "--set", f"federate.initial={run}")
    merging = ["merge", run, run.with_name("further"), "--method", "half"]
    merging += ["--out", tmp_path / "m.safetensors"]
    (tmp_path / "half.py").write_text(HALF)
    plugins = ["--plugin", tmp_path / "half.py", "--plugin", tmp_path / "p.py"]
    assert "no strategy is called 'half'" in refused(*merging)
    assert "nor of the plugins given" in refused(*merging, *plugins[:2])
    fine(*merging, *plugins)
    assert read_json(tmp_path / "m.json")["plugin file"] == sha256_file(tmp_path / "half.py")
    (tmp_path / "p.py").write_text(PROJECTOR + "# changed\n")
    assert "training again, because federate.projector.plugin file: " in fine("federate", config)


def test_weights_that_the_seed_does_not_decide_are_refused(extracted: Path, tmp_path: Path) -> None:
    config = write(tmp_path, extracted, 'plugins = ["p.py"]\nfederate.projector = { name = "scaled" }')
    (tmp_path / "p.py").write_text(PROJECTOR.replace("nn.Linear(", "nn.Bilinear(1, "))
    assert "Bilinear.weight cannot be drawn from the seed" in refused("federate", config)
    plain = PROJECTOR.replace("nn.Linear(d_vision, d_llm)", "nn.Linear(d_vision, d_llm, bias=False)")
    assert plain != PROJECTOR
    (tmp_path / "p.py").write_text(plain)
    fine("federate", config)


def test_ablations_train_plugins_in_processes_of_their_own(extracted: Path, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(HALF)
    (tmp_path / "ablation.toml").write_text(
        f"""
name = "plugged"
seeds = [0, 1]
subject = "half"
plugins = ["half.py"]
measures = ["pope: accuracy"]
better = "higher"
set = ["build={tmp_path}/build", "federate.rounds=1"]
scenarios = {{ one = "{extracted}" }}

[strategies]
fedavg = {{}}
half = {{ rate = 0.3 }}
"""
    )
    words = ("ablate", tmp_path / "ablation.toml", "--jobs", "1", "--out", tmp_path / "report.md")
    fine(*words)
    manifests = [read_json(path) for path in tmp_path.glob("build/runs/study/half-*/manifest.json")]
    assert len(manifests) == 2
    for manifest in manifests:
        assert manifest["identity"]["federate"]["strategy"]["plugin file"] == sha256_file(
            tmp_path / "half.py"
        )
    config = (tmp_path / "ablation.toml").read_text()
    (tmp_path / "ablation.toml").write_text(config.replace("rate = 0.3", "rat = 0.3"))
    assert "unknown key 'strategies.half.rat'; did you mean 'rate'" in refused(*words)


@pytest.mark.skipif("not config.getoption('--slow')")
def test_the_simulation_knows_plugins(extracted: Path, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    config = half(tmp_path, extracted)
    fine("federate", config, "--set", "run=local")
    command = [sys.executable, "-m", "fedcmp", "federate", str(config), "--engine", "simulation"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--set", "run=simulated"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "build/runs/study"
    ours, theirs = (runs / name / "projector.safetensors" for name in ("local", "simulated"))
    assert ours.read_bytes() == theirs.read_bytes()


def install(folder: Path, name: str, group: str, code: str) -> None:
    """A package with an entry point, as pip leaves it in a folder of the path."""
    (folder / f"{name}_plugin.py").write_text(code)
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}_plugin\n")


ASK = """
import json, pathlib, sys
from fedcmp.components import load
from fedcmp.pipeline.errors import UserError
for name in sys.argv[2:]:
    try:
        print(json.dumps(load(pathlib.Path(sys.argv[1]), [f"federate.strategy.name={name}"])
              .federate.strategy.as_built(), sort_keys=True))
    except UserError as error:
        print(error)
"""


def test_installed_packages_bring_components(workplace: Path, tmp_path: Path) -> None:
    install(tmp_path, "halver", "fedcmp.strategies", HALF)
    install(tmp_path, "broken", "fedcmp.strategies", "import nothing_of_this_name")
    install(tmp_path, "empty", "fedcmp.strategies", "x = 1")
    install(tmp_path, "greedy", "fedcmp.strategies", HALF.replace('"half"', '"fedavg"'))
    names = ("half", "fedprox", "fedavg", "quarter")
    half, fedprox, fedavg, quarter = python(
        ASK, workplace / "experiment.toml", *names, path=tmp_path
    ).splitlines()
    hashed = sha256_file(tmp_path / "halver_plugin.py")
    expected = {"name": "half", "plugin file": hashed, "plugin package": "halver 1.2"}
    assert json.loads(half) == expected | {"update": "weights", "proximal": 0.0, "rate": 0.5}
    assert "plugin" not in fedprox
    assert "registered twice, by fedcmp.federate.strategies.fedavg.FedAvg and greedy_plugin.Half" in fedavg
    assert "package broken 1.2 (fedcmp.strategies: broken_plugin) cannot be imported: Module" in quarter
    assert "package empty 1.2 (fedcmp.strategies: empty_plugin) registers no strategy" in quarter


BUILD = """
import sys
from importlib import import_module
from fedcmp.pipeline.options import Component
package, registry, name = sys.argv[1:4]
component = Component(name=name, **dict(each.split("=") for each in sys.argv[4:]))
built = getattr(import_module(package), registry)
print(type(built.build(component, "here")).__name__, built.provenance(component, "here")["plugin package"])
"""


@pytest.mark.parametrize(
    ("group", "code", "words", "said"),
    [
        ("benchmarks", BENCHMARK, ("fedcmp.evaluate.benchmarks", "BENCHMARKS", "lengths"), "Lengths"),
        (
            "sources",
            SOURCE,
            ("fedcmp.extract.sources", "SOURCES", "first_ten", "path=a.json", "images=a"),
            "FirstTen",
        ),
        ("projectors", PROJECTOR, ("fedcmp.pipeline.models.projectors", "PROJECTORS", "scaled"), "Scaled"),
        ("encoders", ENCODER, ("fedcmp.extract.encoders", "ENCODERS", "grid"), "Grid"),
    ],
)
def test_installed_packages_bring_every_kind(
    tmp_path: Path, group: str, code: str, words: tuple[str, ...], said: str
) -> None:
    install(tmp_path, "other", f"fedcmp.{group}", code)
    assert python(BUILD, *words, path=tmp_path).split("\n")[0] == f"{said} other 1.2"


def test_what_writes_components_is_in_one_place() -> None:
    """All that the packages list is there, and importing them starts nothing heavy that is not theirs."""
    code = (
        "import sys\nimport fedcmp.extract.encoders, fedcmp.extract.sources\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "import fedcmp.evaluate.benchmarks, fedcmp.federate.strategies, fedcmp.pipeline.models.projectors\n"
        "for name in ('evaluate.benchmarks', 'extract.encoders', 'extract.sources',\n"
        "             'federate.strategies', 'pipeline.models.projectors'):\n"
        "    module = sys.modules[f'fedcmp.{name}']\n"
        "    assert module.__all__ and all(hasattr(module, each) for each in module.__all__)\n"
    )
    python(code)
