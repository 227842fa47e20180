"""`fedcmp show`: a configuration as the program understands it, for people and for make."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedcmp.commands.options import experiment_options

if TYPE_CHECKING:
    from fedcmp.pipeline.config import Experiment

# make splits at blanks and gives a meaning to $ # % : ; = * ? [ ] and more, the shell to others.
_PLAIN = re.compile(r"[\w./@+][\w./@+-]*")


@click.command()
@experiment_options
@click.option("--make", "for_make", is_flag=True, help="Print what the Makefile needs to know instead.")
def show(config: Path, overrides: tuple[str, ...], for_make: bool) -> None:
    """Print an experiment or ablation as TOML: `extends` merged, defaults written out.

    The output is itself a valid experiment file of the same meaning.

    \b
    Example:
      fedcmp show configs/demo/fedcmp.toml
      fedcmp show configs/demo/fedcmp.toml --set federate.rounds=5 > short.toml
      fedcmp show configs/demo.toml --make
    """
    from fedcmp.components import load, written_out
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.toml import read_toml

    if "scenarios" in read_toml(config):
        from fedcmp.ablation.file import experiments, read_ablation

        if overrides:
            raise UserError(f"--set {overrides[0]}: an ablation takes no overrides; write it into {config}")
        ablation = read_ablation(config)
        if for_make:
            click.echo(f"EXPERIMENTS += {_words(config, experiments(ablation))}")
        else:
            _print(ablation.model_dump(mode="json", exclude_none=True))
    elif for_make:
        for name, value in _variables(config, overrides):
            click.echo(f"{name} := {value}")
    else:
        _print(written_out(load(config, overrides)))


def _print(tables: dict[str, Any]) -> None:
    import tomli_w

    click.echo(tomli_w.dumps(tables), nl=False)


def _variables(config: Path, overrides: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What the Makefile needs to know of an experiment and its runs.

    Raises:
        UserError: The runs do not share caches, two have one name, or make cannot name something.
    """
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.toml import files, load

    experiment = load(config, overrides)
    runs: dict[str, tuple[Path, Experiment]] = {}
    for path in sorted(config.with_suffix("").glob("*.toml")) or [config]:
        run = load(path, overrides)
        for key in ("experiment", "extract", "features", "store", "build"):
            if getattr(run, key) != getattr(experiment, key):
                raise UserError(
                    f"{path}: {key} differs from that of {config}; runs of one experiment share it, "
                    f"so give this file an experiment of its own: configs/NAME.toml"
                )
        if run.run in runs:
            raise UserError(f"{path}: run = '{run.run}' is the name of {runs[run.run][0]}, too; rename one")
        runs[run.run] = path, run
    yield "FILES", _words(config, [*files(config), *_plugins(experiment)])
    yield "FEATURES", _words(config, [experiment.features])
    yield "SILOS", _words(config, experiment.extract.silos)
    yield "RUN_DIR", _words(config, [experiment.run_path.parent])
    yield "SCORE_DIR", _words(config, [experiment.scores_path.parent])
    yield "REPORT_DIR", _words(config, [experiment.report_path])
    yield "RUNS", _words(config, runs)
    for name, (path, run) in runs.items():
        yield f"config_{name}", _words(path, [path])
        yield f"files_{name}", _words(path, [*files(path), *_plugins(run)])
        yield f"benchmarks_{name}", _words(path, run.evaluate.benchmarks)


def _plugins(experiment: Experiment) -> list[str]:
    """Its plugin files that are there; of others the stages say what is wrong."""
    return [os.path.relpath(each) for each in experiment.plugins if each.is_file()]


def _words(source: Path, names: Any) -> str:
    """Names as a list that make and its shell read as they stand.

    Raises:
        UserError: A name has a character that they would not.
    """
    from fedcmp.pipeline.errors import UserError

    words = [str(name) for name in names]
    for word in words:
        if not _PLAIN.fullmatch(word):
            raise UserError(
                f"{source}: make cannot take the name '{word}'; use letters, digits and . _ - / @ + alone, "
                "or call fedcmp extract, federate and evaluate yourself"
            )
    return " ".join(words)
