"""`fedcmp benchmarks`: every benchmark and option is explained, and nothing heavy is loaded for it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

from fedcmp.cli import main
from fedcmp.evaluate.benchmarks.base import BENCHMARKS, Benchmark
from fedcmp.evaluate.describe import described

ALL = described(BENCHMARKS.names())


def shown(*words: str) -> str:
    result = CliRunner().invoke(main, ["benchmarks", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_benchmark_is_listed_with_its_options() -> None:
    output = shown()
    lines = output.splitlines()
    for each in ALL:
        assert each.name in lines
        assert len(each.about.split()) > 3
    flat = " ".join(output.split())
    assert "(Li et al., 2023; AoiDragon/POPE). questions, rank = false retrieval" in flat
    assert "path, max_new_tokens = 512, grades" in flat
    assert 'agreement = "leave_one_out"' in flat
    assert flat.endswith(
        "all max_new_tokens = 32, stop = [], silos = [], silo, images, prompt_suffix, system_prompt"
    )


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_every_option_is_explained(each) -> None:  # type: ignore[no-untyped-def]
    output = " ".join(shown(each.name).split())
    cls = BENCHMARKS.registered(each.name)
    assert {option.name for option in [*each.own, *each.common]} == set(cls.model_fields)
    assert {option.name for option in each.common} <= set(Benchmark.model_fields)
    for option in [*each.own, *each.common]:
        assert option.means, option.name
        assert option.takes != "value", option.name
        assert f"{option.name}: {option.takes}; " in output
        assert (option.default is None) is cls.model_fields[option.name].is_required()
    assert f'name = "{each.name}"' in output


def test_one_of_another_name_is_suggested() -> None:
    result = CliRunner().invoke(main, ["benchmarks", "popes"])
    assert result.exit_code == 2
    assert "no benchmark is called 'popes'; did you mean 'pope'?" in result.output


@pytest.mark.parametrize("words", [["benchmarks"], ["benchmarks", "vqa"], ["benchmarks", "--help"]])
def test_nothing_heavy_is_loaded(words: list[str]) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fedcmp.cli import main\n"
        f"assert CliRunner().invoke(main, {words!r}).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'zarr', 'scipy', 'pandas', 'pyarrow', 'rich', 'fsspec', "
        "'fedcmp.pipeline.cache', 'fedcmp.pipeline.config'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_it_takes_little_more_than_numpy_and_pydantic() -> None:
    def seconds(*words: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT, capture_output=True)
        return time.perf_counter() - began

    least = min(seconds("-c", "import numpy, pydantic.main, click") for _ in range(3))
    ours = min(seconds("-m", "fedcmp", "benchmarks") for _ in range(3))
    assert ours < 3 * least


def test_plugins_get_the_cache_by_its_name() -> None:
    from fedcmp.evaluate import benchmarks
    from fedcmp.pipeline.cache import FeatureCache

    assert benchmarks.FeatureCache is FeatureCache
    with pytest.raises(AttributeError, match="FeatureCash"):
        _ = benchmarks.FeatureCash
    assert Path(benchmarks.__file__).name == "__init__.py"
