"""`fedcmp federate`: stage two."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiment_options, key_options


@click.command()
@experiment_options
@click.option(
    "--engine",
    type=click.Choice(["local", "flower", "simulation"]),
    default="local",
    show_default=True,
    help="Where silos train: in this process, at their sites, or in Flower's simulation.",
)
@click.option(
    "--address",
    default="127.0.0.1:18080",
    show_default=True,
    metavar="HOST:PORT",
    help="Where this machine listens for sites.",
)
@key_options
@click.option("--certificate", type=click.Path(path_type=Path), help="The server's certificate.")
@click.option("--key", type=click.Path(path_type=Path), help="The server's private key.")
@click.option(
    "--site-keys", type=click.Path(path_type=Path), metavar="DIR", help="Public keys of the sites, NAME.pub."
)
def federate(
    config: Path,
    overrides: tuple[str, ...],
    engine: str,
    address: str,
    insecure: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    site_keys: Path | None,
) -> None:
    """Train the projector federatedly from the caches, against the frozen LLM.

    \b
    Example:
      fedcmp federate configs/demo/fedcmp.toml
      fedcmp federate configs/demo/fedavg.toml --set federate.rounds=5 --set run=short
      fedcmp federate configs/demo/fedcmp.toml --engine flower --insecure
      torchrun --nproc-per-node 2 -m fedcmp federate configs/demo/fedcmp.toml
    """
    from fedcmp.components import load
    from fedcmp.pipeline.ranks import joined, refuse_ranks

    if engine == "local":
        from fedcmp.federate.run import run_over

        with joined() as ranks:
            run_over(lambda: load(config, overrides), ranks)
        return
    refuse_ranks(f"--engine {engine}")
    experiment = load(config, overrides)
    from fedcmp.federate.engines.flower.processes import need_flower

    need_flower()
    if engine == "simulation":
        from fedcmp.federate.engines.flower.link import simulate

        simulate(experiment)
        return
    from fedcmp.federate.engines.flower import launch
    from fedcmp.federate.engines.flower.keys import Keys

    keys = Keys(ca=ca, certificate=certificate, key=key, sites=site_keys, insecure=insecure)
    launch.federate(experiment, config, overrides, address, keys)
