"""`fedcmp federate`, stage two, and `fedcmp merge`."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.cli import F, experiment_options

_KEY_OPTIONS = (
    click.option(
        "--insecure", is_flag=True, help="No encryption, within one machine or behind a proxy on it."
    ),
    click.option("--ca", type=click.Path(path_type=Path), help="Certificate authority of the server."),
)


def _key_options(command: F) -> F:
    for option in _KEY_OPTIONS:
        command = option(command)
    return command


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
@_key_options
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
    """
    from fedcmp.components import load

    experiment = load(config, overrides)
    if engine == "local":
        from fedcmp.federate.run import run

        run(experiment)
        return
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


@click.command()
@experiment_options
@click.option("--silo", required=True, help="This site's silo.")
@click.option("--superlink", required=True, metavar="HOST:PORT", help="The server.")
@_key_options
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
    """
    from fedcmp.components import load
    from fedcmp.federate.engines.flower.processes import need_flower
    from fedcmp.pipeline.errors import UserError

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
    launch.site(Service(experiment, silo, signed), silo, superlink, keys, patience)


@click.command()
@click.argument("projectors", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--method", "methods", multiple=True, required=True, metavar="NAME", help="Any strategy; repeatable."
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write, or a folder that gets NAME.safetensors of each method.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Projector they were trained from; else zero.")
@click.option("--weights", metavar="N1,N2,...", help="Samples of each; else those of the runs' histories.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="[METHOD.]OPTION=VALUE",
    help="A method's option; repeatable.",
)
@click.option(
    "--features",
    multiple=True,
    metavar="CACHE",
    type=click.Path(path_type=Path),
    help="Feature cache to compute alignments from: one each in order, or one for all.",
)
@click.option(
    "--language", metavar="DIR", type=click.Path(path_type=Path), help="The frozen LLM, for alignments."
)
@click.option(
    "--template",
    type=click.Choice(["plain", "chat", "v1"]),
    default="plain",
    show_default=True,
    help="How texts become prompts.",
)
@click.option(
    "--texts", type=click.IntRange(2), default=256, show_default=True, help="Texts to take from each cache."
)
def merge(
    projectors: tuple[Path, ...],
    methods: tuple[str, ...],
    out: Path,
    base: Path | None,
    weights: str | None,
    overrides: tuple[str, ...],
    features: tuple[Path, ...],
    language: Path | None,
    template: str,
    texts: int,
) -> None:
    """Merge trained projectors, files or directories of runs, into one without training.

    \b
    Example:
      fedcmp merge build/runs/demo/local_only/silos/*.safetensors \\
        --base build/runs/demo/untrained --method fedavg --method pivotmerge --out build/merged
    """
    from fedcmp.federate.merge.merge import Guide
    from fedcmp.federate.merge.merge import merge as merge_projectors
    from fedcmp.pipeline.errors import UserError

    if bool(features) != bool(language):
        raise UserError("--features and --language are needed together, to compute alignments; give both")
    guide = None
    if language:
        guide = Guide(features=features, language=language, template=template, texts=texts)
    merge_projectors(
        projectors,
        methods,
        out,
        base=base,
        weights=weights,
        overrides=overrides,
        guide=guide,
    )
