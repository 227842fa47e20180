"""`fedcmp site`: a silo at its own place."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiment_options, key_options


@click.command()
@experiment_options
@click.option("--silo", required=True, help="This site's silo.")
@click.option("--superlink", required=True, metavar="HOST:PORT", help="The server.")
@key_options
@click.option("--key", type=click.Path(path_type=Path), help="This site's private key.")
@click.option(
    "--site-keys",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Public keys of all sites, SILO.pub: sign secure sums, and check the others' signatures.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=1),
    default=3600.0,
    show_default=True,
    help="Seconds without a server after which to give up.",
)
def site(
    config: Path,
    overrides: tuple[str, ...],
    silo: str,
    superlink: str,
    insecure: bool,
    ca: Path | None,
    key: Path | None,
    site_keys: Path | None,
    patience: float,
) -> None:
    """Hold a silo's cache and the frozen LLM ready to train for a server.

    \b
    Example:
      fedcmp site configs/demo/fedcmp.toml --silo photo --superlink 127.0.0.1:18080 --insecure
      torchrun --nproc-per-node 2 -m fedcmp site configs/demo/fedcmp.toml \
        --silo photo --superlink 127.0.0.1:18080 --insecure
    """
    from fedcmp.components import load
    from fedcmp.federate.engines.flower.processes import need_flower
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.ranks import joined

    with joined() as ranks:
        if ranks is not None and not ranks.leads:
            from fedcmp.federate.ranks.follow import follow

            follow(lambda: load(config, overrides), silo, ranks)
            return
        experiment = load(config, overrides)
        need_flower()
        from fedcmp.federate.engines.flower import launch
        from fedcmp.federate.engines.flower.keys import Keys, signing
        from fedcmp.federate.engines.service import Service

        keys, signed = Keys(ca=ca, key=key, insecure=insecure), None
        if site_keys is not None:
            if key is None:
                raise UserError("--site-keys: a site signs with its own key; give --key as well")
            signed = signing(key, site_keys, silo, experiment.federate.silos)
        launch.site(Service(experiment, silo, signed, ranks), silo, superlink, keys, patience)
