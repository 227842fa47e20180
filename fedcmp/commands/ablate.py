"""`fedcmp ablate`: strategies over scenarios and seeds."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time; by default one a GPU, or a core without any.",
)
@click.option(
    "--worker",
    metavar="I/N",
    help="Share the runs with other workers, and write no tables; 'auto' asks Slurm or torchrun.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Markdown; build/ablations/NAME.md by default.")
def ablate(configs: tuple[Path, ...], jobs: int | None, worker: str | None, out: Path | None) -> None:
    """Compare strategies over scenarios and seeds, sharing equal local training.

    Options given as lists are chosen on the tuning seeds' validation split; where the best value is the
    first or last of its list, the command ends with an error before results are computed, or tries further
    values: [tuning] edges = "error" or "extend". Interrupted, the same command goes on; runs
    that are done are not done again. Several workers may share them, on one machine or on many that see
    the same files; the command without --worker then writes the tables.

    \b
    Example:
      fedcmp ablate configs/ablations/methods.toml
      fedcmp ablate configs/ablations/*.toml --out docs/results.md
      fedcmp ablate configs/ablations/methods.toml --worker 0/2
    """
    from fedcmp.ablation.file import read_ablation
    from fedcmp.ablation.report import Section, section, write
    from fedcmp.ablation.sweep import sweep
    from fedcmp.pipeline.console import say

    ablations = [read_ablation(config) for config in configs]
    out = out or Path("build/ablations") / f"{ablations[0].name}.md"
    sections: list[Section] = []
    for finished in sweep(ablations, jobs, worker):
        if worker is None:
            sections.append(section(finished))
    if worker is not None:
        say(f"All runs are done; 'fedcmp ablate {' '.join(map(str, configs))}' writes the tables")
        return
    write(out, sections, configs)
    say(f"Tables and plots in {out}")
