"""The ablation engine on real files: tuning, memoisation, resuming, tables."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.ablation import contest, sweep
from fedcmp.ablation.edges import at_edges
from fedcmp.ablation.file import Trial, grid, read_ablation, trial
from fedcmp.cli import main
from fedcmp.evaluate.report.charts import dots
from fedcmp.evaluate.statistics import holm, paired, ratio
from fedcmp.pipeline.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")


def write(folder: Path, experiment: Path, extra: str = "") -> Path:
    path = folder / "study.toml"
    path.write_text(
        f"""
name = "study"
title = "A study"
seeds = [0, 1]
measures = ["loss: loss", "pope: accuracy", "both"]
means.both = ["pope: accuracy", "pope: f1"]
set = ["build={folder}/build", "memo.path={folder}/memo", "evaluate.benchmarks.loss.split=test"]

[scenarios]
skewed = "{experiment}"

[tuning]
seeds = [7]
measure = "loss: loss"
edges = "report"

[contest]
rivals = ["fedavg"]

[strategies]
fedavg = {{ server_learning_rate = [1.0, 1.5] }}
fedcmp = {{}}
{extra}
"""
    )
    return path


def ablate(path: Path, *options: str) -> Result:
    out = path.parent / "report.md"
    return CliRunner().invoke(main, ["ablate", str(path), "--jobs", "2", "--out", str(out), *options])


def rows(folder: Path) -> dict[str, list[str]]:
    """Cells of the first table by strategy."""
    text = (folder / "report.md").read_text().split("### skewed")[1].split("![")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return {name: others for name, *others in cells}


def projectors(folder: Path) -> dict[str, bytes]:
    files = folder.rglob("runs/**/projector.safetensors")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def done(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("ablation")
    broken = 'broken = { name = "fedavg", server_learning_rate = 1e38 }'
    path = write(folder, extracted, broken)
    text = path.read_text()
    # Of two values one is always at an edge, which is an error before the seeds of the results are used.
    path.write_text(text.replace('edges = "report"\n', ""))
    refused = ablate(path)
    assert refused.exit_code == 2, refused.output
    assert "study: 1 options were not tuned" in refused.output.replace("\n", " ")
    assert not (folder / "report.md").exists()
    assert len(projectors(folder)) == 2
    path.write_text(text)
    result = ablate(path)
    assert result.exit_code == 0, result.output
    return folder, result


def test_grids_may_hold_options_of_the_optimiser(tmp_path: Path, extracted: Path) -> None:
    path = write(tmp_path, extracted)
    text = path.read_text().replace("[1.0, 1.5] }", '[1.0, 1.5], "optimizer.learning_rate" = [1e-3, 3e-3] }')
    path.write_text(text)
    ablation = read_ablation(path)
    trials = [trial(ablation, "skewed", "fedavg", 0, options) for options in grid(ablation, "fedavg")]
    found = [
        (each.experiment.federate.optimizer.learning_rate, each.experiment.federate.strategy.as_built())
        for each in trials
    ]
    assert [(rate, built["server_learning_rate"]) for rate, built in found] == [
        (1e-3, 1.0),
        (3e-3, 1.0),
        (1e-3, 1.5),
        (3e-3, 1.5),
    ]
    assert len({each.experiment.run_path for each in trials}) == 4
    path.write_text(text.replace("optimizer.learning_rate", "optimizer.rate"))
    result = ablate(path)
    assert result.exit_code == 2
    assert "federate.optimizer.rate" in result.output


def test_a_sweep_ends_in_a_table_and_a_plot(done: tuple[Path, Result]) -> None:
    folder, result = done
    table = rows(folder)
    assert set(table) == {"fedavg", "fedcmp"}
    assert re.fullmatch(r"server_learning_rate 1\.[05]", table["fedavg"][0])
    assert re.fullmatch(r"[+-]0\.\d{3} \([+-]\d+\.\d{3} to [+-]\d+\.\d{3}\)", table["fedcmp"][3])
    plot = ElementTree.parse(folder / "results" / "study-skewed.svg")
    assert len(plot.findall(".//{*}circle")) == 4
    assert re.search(r"\d+ s \(\d+%\) recalled", result.output)
    assert len(projectors(folder)) == 2 + 2 * 2 + 2 - 2  # tuning, results, none of the broken ones


def test_a_run_that_diverges_is_reported_and_the_sweep_goes_on(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert "diverged" in (folder / "report.md").read_text()
    assert result.output.count("broken-") == 2


def test_strategies_share_the_first_round(done: tuple[Path, Result]) -> None:
    folder, _ = done
    recalled = [
        '"recalled": true' in line and '"round": 0' in line
        for file in folder.rglob("runs/**/history.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert sum(recalled) >= 4


def test_the_means_are_those_of_the_scores(done: tuple[Path, Result], extracted: Path) -> None:
    folder, _ = done
    ablation = read_ablation(folder / "study.toml")
    values = [trial(ablation, "skewed", "fedcmp", seed, ()).score("loss: loss") for seed in (0, 1)]
    assert rows(folder)["fedcmp"][1:3] == [f"{np.mean(values):.3f}", f"{np.std(values, ddof=1):.3f}"]
    found = [
        trial(ablation, "skewed", "fedcmp", seed, ()).score(f"pope: {metric}")
        for seed in (0, 1)
        for metric in ("accuracy", "f1")
    ]
    assert rows(folder)["fedcmp"][-1] == f"{np.mean(found):.3f}"
    assert "both is the mean of pope: accuracy, pope: f1." in (folder / "report.md").read_text()


def test_a_strategy_may_have_a_projector_of_its_own_and_tables_as_options(
    tmp_path: Path, extracted: Path
) -> None:
    path = write(tmp_path, extracted)
    own = (
        'fedcmp = { name = "pilot", tasks = { clinic = "a", lab = "b" }, "projector.name" = "pilot", '
        '"projector.tasks" = [["a", "b"]], "adapter.rank" = [2, 4], "adapter.alpha" = 8 }'
    )
    path.write_text(path.read_text().replace("fedcmp = {}", own))
    ablation = read_ablation(path)
    trials = [trial(ablation, "skewed", "fedcmp", 0, options) for options in grid(ablation, "fedcmp")]
    first, second = (each.experiment.federate for each in trials)
    assert first.strategy.as_built()["tasks"] == {"clinic": "a", "lab": "b"}
    assert first.projector.as_built()["tasks"] == ["a", "b"]
    assert first.adapter is not None
    assert second.adapter is not None
    assert (first.adapter.rank, second.adapter.rank) == (2, 4)
    assert trial(ablation, "skewed", "fedavg", 0, ()).experiment.federate.adapter is None


def test_what_options_are_chosen_by_may_be_better_the_other_way(tmp_path: Path, extracted: Path) -> None:
    path = write(tmp_path, extracted)
    changes = {
        'measures = ["loss: loss", ': 'better = "higher"\nmeasures = [',
        'edges = "report"': 'edges = "report"\nbetter = "lower"',
        '[contest]\nrivals = ["fedavg"]': "",
    }
    text = path.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)
    ablation = read_ablation(path)
    assert (ablation.sign, ablation.tuning_sign) == (-1, 1)
    path.write_text(text.replace('\nbetter = "lower"', ""))
    with pytest.raises(UserError, match=r"tuning\.measure: 'loss: loss': of losses the lower is better"):
        read_ablation(path)


def test_running_again_does_nothing(done: tuple[Path, Result]) -> None:
    folder, _ = done
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("runs/**/projector.safetensors")}
    report = (folder / "report.md").read_text()
    assert ablate(folder / "study.toml").exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (folder / "report.md").read_text() == report


@pytest.mark.skipif("not config.getoption('--slow')")
def test_a_killed_sweep_goes_on_and_gives_the_same_bytes(
    done: tuple[Path, Result], extracted: Path, tmp_path: Path
) -> None:
    folder, _ = done
    path = write(tmp_path, extracted)
    out = str(tmp_path / "report.md")
    command = [sys.executable, "-m", "fedcmp", "ablate", str(path), "--jobs", "2", "--out", out]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.rglob("runs/**/history.jsonl")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    # Workers notice within a second that they are alone, and let go of their runs.
    time.sleep(3)
    assert not (tmp_path / "report.md").exists()
    assert ablate(path).exit_code == 0
    ours, theirs = projectors(tmp_path), projectors(folder)
    assert len(ours) == 6
    assert all(theirs[name] == content for name, content in ours.items())


def test_memoisation_changes_no_byte(done: tuple[Path, Result], extracted: Path, tmp_path: Path) -> None:
    folder, _ = done
    path = write(tmp_path, extracted)
    path.write_text(re.sub(r'"memo\.path=[^"]*", ', "", path.read_text()))
    assert ablate(path).exit_code == 0
    ours, theirs = projectors(tmp_path), projectors(folder)
    assert all(theirs[name] == content for name, content in ours.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "study"', ""), "'name' is missing"),
        (("seeds = [0, 1]", "seeds = [0]"), "seeds = .*at least 2"),
        (("seeds = [7]", "seeds = [1]"), "a seed is named twice"),
        (("fedcmp = {}", "fedcmpp = {}"), "subject = 'fedcmp': no such strategy; did you mean 'fedcmpp'"),
        (
            ('[tuning]\nseeds = [7]\nmeasure = "loss: loss"\nedges = "report"', ""),
            r"fedavg has a list .*add a table",
        ),
        (("fedcmp = {}", "fedcmp = { kapa = 1 }"), r"'strategies\.fedcmp\.kapa'; did you mean 'kappa'"),
        (("fedcmp = {}", 'fedcmp = { name = "fedcmq" }'), "no strategy is called 'fedcmq'"),
        (("loss: loss", "loss: los"), "benchmark 'loss' has no such metric; did you mean 'loss'"),
        (("loss: loss", "lost: loss"), "--benchmark lost: not configured; did you mean 'loss'"),
        (("skewed =", "skewed = 1 #"), r"scenarios\.skewed = 1"),
        (("seeds = [0, 1]", "seeds = [0, 0]"), "a seed is named twice"),
        (("seeds = [7]", "seeds = [7]\nscreened = 2"), r"tuning\.screened = 2: there are 1 seeds"),
        (("[1.0, 1.5]", "[]"), r"fedavg\.server_learning_rate = \[\]: give different values"),
        (("[1.0, 1.5]", "[1.0, 1.0]"), "give different values"),
        (('set = ["', 'set = ["seed=3", "'), "the ablation itself decides this"),
        (
            ('rivals = ["fedavg"]', 'rivals = ["fedavgg"]'),
            "contest.rivals = 'fedavgg': no such strategy",
        ),
        (('rivals = ["fedavg"]', "rivals = []"), r"contest\.rivals"),
        (('title = "A study"', 'better = "higher"'), "contest: compares ratios of losses"),
        (('"both"]', '"bot"]'), "measures: 'bot': expected 'benchmark: metric', or a name of"),
        (("name", "= ="), "not valid TOML"),
    ],
)
def test_mistakes_are_one_line(
    extracted: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    path = write(tmp_path, extracted)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    result = ablate(path)
    assert result.exit_code == 2
    assert re.search(message, result.output)
    assert "Traceback" not in result.output


def test_the_contest_and_what_was_not_tuned_are_in_the_report(done: tuple[Path, Result]) -> None:
    folder, _ = done
    text = (folder / "report.md").read_text()
    of_contest = text.split("### The contest")[1].split("###")[0]
    row = r"\| fedavg \| \d\.\d\d \(.* to .*\) \| \d\.\d{4} \| .* p \d\.\d{4}, [012] of 2 \|"
    assert re.search(row, of_contest)
    assert re.search(
        r"- not tuned: fedavg, skewed: server_learning_rate = 1\.[05], at the edge of 1\.0, 1\.5", text
    )


def test_all_are_screened_and_the_better_quarter_is_tuned(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best on the first seed, rate 5, is worse than the second best on the others."""
    path = write(tmp_path, extracted, "muon = { server_learning_rate = [1, 2, 3, 4, 5, 6, 7, 8] }")
    path.write_text(path.read_text().replace("seeds = [7]", "seeds = [7, 8, 9]\nscreened = 1"))
    asked: list[list[Trial]] = []

    def run_all(pool: object, ablation: object, trials: list[Trial], *rest: object) -> dict[Path, str]:
        asked.append([each for each in trials if each.strategy == "muon"])
        return {}

    def score(tried: Trial, measure: str) -> float:
        rate = dict(tried.options)["server_learning_rate"]
        return float(abs(rate - 4.6) if tried.seed == 7 else abs(rate - 3.9))

    monkeypatch.setattr(sweep, "_run_all", run_all)
    monkeypatch.setattr(Trial, "score", score)
    found = sweep._tuned(None, read_ablation(path), tmp_path / "log")  # type: ignore[arg-type]
    first, second = ([(dict(t.options)["server_learning_rate"], t.seed) for t in each] for each in asked)
    assert first == [(rate, 7) for rate in range(1, 9)]
    assert second == [(5, 8), (5, 9), (4, 8), (4, 9)]
    assert dict(found.chosen["skewed", "muon"]) == {"server_learning_rate": 4}
    assert dict(found.chosen["skewed", "fedcmp"]) == {}
    assert found.failures == {}


def test_grids_are_extended_until_the_best_is_inside(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = "server_learning_rate = [1.0, 2.0, 4.0], momentum = [0.0, 0.3, 0.6], proximal = [0.1, 0.2]"
    path = write(tmp_path, extracted, f"muon = {{ {grids} }}")
    path.write_text(path.read_text().replace('"report"', '"extend"').replace("[1.0, 1.5]", "[0.5, 1.0, 1.5]"))
    asked: list[Trial] = []

    def run_all(pool: object, ablation: object, trials: list[Trial], *rest: object) -> dict[Path, str]:
        asked.extend(trials)
        return {}

    def score(tried: Trial, measure: str) -> float:
        options = dict(tried.options)
        if tried.strategy != "muon":
            return abs(float(options["server_learning_rate"]) - 1.1)
        off = abs(options["momentum"] - 0.88) + abs(options["proximal"] - 0.05)
        return float(off + abs(options["server_learning_rate"] - 20) / 100)

    monkeypatch.setattr(sweep, "_run_all", run_all)
    monkeypatch.setattr(Trial, "score", score)
    ablation = read_ablation(path)
    found = sweep._tuned(None, ablation, tmp_path / "log")  # type: ignore[arg-type]
    assert dict(found.chosen["skewed", "muon"]) == {
        "server_learning_rate": 16.0,
        "momentum": 0.9,
        "proximal": 0.05,
    }
    assert found.tried["skewed", "muon"] == {
        "server_learning_rate": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        "momentum": [0.0, 0.3, 0.6, 0.8, 0.9, 0.95],  # 1.2 is none
        "proximal": [0.025, 0.05, 0.1, 0.2],
    }
    assert found.tried["skewed", "fedavg"] == {"server_learning_rate": [0.5, 1.0, 1.5]}
    assert list(at_edges(ablation, found.chosen, found.tried)) == []
    monkeypatch.setattr(
        Trial, "score", lambda tried, measure: -float(dict(tried.options)["server_learning_rate"])
    )
    endless = sweep._tuned(None, ablation, tmp_path / "log")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at the edge of"):
        sweep._require_tuned(ablation, endless)


def test_edges_by_hand(extracted: Path, tmp_path: Path) -> None:
    options = "proximal = [0.0, 0.1, 0.2], momentum = [0.1, 0.3, 0.5]"
    kinds = 'update = ["weights", "path"], server_learning_rate = 3.0'
    ablation = read_ablation(write(tmp_path, extracted, f"muon = {{ {options}, {kinds} }}"))

    def found(proximal: float, momentum: float, update: str = "path") -> list[str]:
        chosen = (("proximal", proximal), ("momentum", momentum), ("update", update))
        chosen += (("server_learning_rate", 3.0),)  # type: ignore[assignment]
        return list(at_edges(ablation, {("skewed", "muon"): chosen}))

    assert found(0.1, 0.3) == found(0.0, 0.3) == found(0.1, 0.3, "weights") == []
    assert found(0.2, 0.3) == ["muon, skewed: proximal = 0.2, at the edge of 0.0, 0.1, 0.2"]
    assert len(found(0.2, 0.1)) == len(found(0.2, 0.5)) == 2


def test_the_contest_by_hand(extracted: Path, tmp_path: Path) -> None:
    """Two scenarios, four seeds: half the loss in one, the same in the other."""
    path = write(tmp_path, extracted)
    text = path.read_text().replace("seeds = [0, 1]", "seeds = [0, 1, 2, 3]")
    other = tmp_path / "other.toml"
    other.write_text(f'extends = "{extracted}"\nexperiment = "other"\n')
    path.write_text(text.replace("[scenarios]\n", f'[scenarios]\nother = "{other}"\n'))
    ablation = read_ablation(path)
    theirs, ours = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.5, 2.0001]
    values = {
        "skewed": {"fedcmp": ours, "fedavg": theirs},
        "other": {"fedcmp": theirs, "fedavg": theirs},
    }
    found = contest.primary(ablation, values, "fedavg")
    assert (found.value, found.low, found.high) == pytest.approx([0.5**0.5] * 3, abs=1e-4)
    assert found.p == pytest.approx(2 / 16)
    columns, ((rival, over_all, p, of_other, of_skewed),) = contest.rows(ablation, values)
    assert columns == ["fedcmp / rival", "all scenarios", "p (Holm)", "other", "skewed"]
    assert (rival, over_all, p) == ("fedavg", "0.71 (0.71 to 0.71)", "0.1250")
    assert of_skewed == "0.50 (0.50 to 0.50) p 0.2500, 4 of 4"
    assert of_other == "1.00 (1.00 to 1.00) p 1.0000, 0 of 4"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(2, 8))
def test_ratios_are_tested_by_every_flip_of_signs(seed: int, number: int) -> None:
    generator = np.random.default_rng(seed)
    ours, theirs = np.exp(generator.normal(-0.2, 1, number)), np.exp(generator.normal(0, 1, number))
    logs = np.log(ours / theirs)
    means = [abs(np.mean(np.array(signs) * logs)) for signs in product([-1, 1], repeat=number)]
    found = ratio(ours.tolist(), theirs.tolist())
    assert found.p == pytest.approx(np.mean(np.array(means) >= abs(logs.mean()) * (1 - 1e-12)))
    assert found.value == pytest.approx(np.exp(logs.mean()))
    of_logs = paired(logs.tolist(), [0.0] * number)
    assert (found.low, found.high) == pytest.approx((np.exp(of_logs.low), np.exp(of_logs.high)))
    assert ratio((3 * ours).tolist(), (3 * theirs).tolist()).value == pytest.approx(found.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = ablate(tmp_path / "none.toml")
    assert (result.exit_code, "no such file" in result.output) == (2, True)


def test_a_grid_is_every_combination(extracted: Path, tmp_path: Path) -> None:
    lists = "momentum = [0.1, 0.2], server_learning_rate = [1.0, 2.0]"
    extra = f'both = {{ name = "fedavgm", {lists}, proximal = 0.1 }}'
    ablation = read_ablation(write(tmp_path, extracted, extra))
    combinations = list(grid(ablation, "both"))
    assert len(set(combinations)) == 4
    one = trial(ablation, "skewed", "both", 5, combinations[-1])
    assert one.experiment.seed == 5
    assert one.experiment.federate.strategy.name == "fedavgm"
    assert one.experiment.federate.strategy.model_extra == {
        "momentum": 0.2,
        "server_learning_rate": 2.0,
        "proximal": 0.1,
    }
    names = {trial(ablation, "skewed", "both", 5, each).experiment.run for each in combinations}
    assert len(names) == 4


def test_paired_differences_by_hand() -> None:
    """t = 2 / (1 / sqrt 3), two degrees of freedom: quantile 4.3027."""
    result = paired([3.0, 4.0, 5.0], [2.0, 2.0, 2.0])
    half = 4.302653 / 3**0.5
    assert (result.mean, result.low, result.high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-5)
    assert result.p == pytest.approx(0.0741799, abs=1e-6)
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_plot_has_a_dot_a_value() -> None:
    svg = dots({"a<b": [0.1, 0.2], "c": [1.0]}, "loss")
    assert svg.count("<circle") == 3
    assert "a&lt;b" in svg
