"""`fedcmp world`: the embedded default's data and models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fedcmp.commands.options import experiment_options

WEIGHTS = Path(__file__).parent.parent / "pipeline/world/weights"


@click.group()
def world() -> None:
    """Write the embedded default's data, or train its models.

    \b
    Example:
      fedcmp world write build/world
    """


@world.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scenario",
    default="demo",
    show_default=True,
    type=click.Choice(("demo", "content", "domain", "quantity", "many", "tasks")),
    help="How data differ between silos.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the data.")
@click.option("--silo-images", default=1152, show_default=True, help="Images of a silo, on average.")
@click.option("--heldout-images", default=600, show_default=True, help="Images nobody trains on.")
@click.option("--validation-images", default=0, show_default=True, help="Images to tune options on.")
def write(out: Path, **amounts: Any) -> None:
    """Write silos, held-out images and benchmark files.

    \b
    Example:
      fedcmp world write build/world --silo-images 200
      fedcmp world write build/world/many-3 --scenario many --seed 3 --validation-images 200
    """
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.world.write import Amounts
    from fedcmp.pipeline.world.write import write as write_world

    write_world(out, Amounts(**amounts))
    say(
        f"Wrote {6 * amounts['silo_images']} images of scenario '{amounts['scenario']}' "
        f"and {amounts['heldout_images']} held-out images to {out}"
    )


@world.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of what is held out.")
@click.option(
    "--most", default=160, show_default=True, type=click.IntRange(20), help="Pictures of a group at most."
)
def pictograms(out: Path, seed: int, most: int) -> None:
    """Download and write the study on real weights: OpenMoji's pictograms, an encoder and an LLM.

    About 115 MB are downloaded, each file once: OpenMoji 17 (CC BY-SA 4.0), EfficientNet-Lite0 and
    SmolLM2-135M-Instruct (both Apache 2.0).

    \b
    Example:
      fedcmp world pictograms build/pictograms
    """
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.pictograms.write import write as write_pictograms

    counts = write_pictograms(out, seed=seed, most=most)
    say(
        f"Wrote {sum(counts.values())} pictograms ({', '.join(f'{name} {n}' for name, n in counts.items())}),"
    )
    say(f"an encoder and an LLM to {out}")


@world.command()
@experiment_options
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of scenes and answers.")
@click.option(
    "--silo-preferences", default=240, show_default=True, help="Preferences of a silo, of each kind."
)
@click.option("--prompts", default=600, show_default=True, help="Public prompts of a kind.")
@click.option("--public-preferences", default=200, show_default=True, help="Public preferences of a kind.")
def prefer(config: Path, overrides: tuple[str, ...], out: Path, **amounts: int) -> None:
    """Write what silos prefer: a finished run's answers about new scenes, ranked by what is to be seen.

    \b
    Example:
      fedcmp world prefer configs/demo/fedavg.toml build/world/align
    """
    from fedcmp.components import load
    from fedcmp.pipeline.console import progress, say
    from fedcmp.pipeline.world import scenes
    from fedcmp.world_preferences import KINDS, Amounts
    from fedcmp.world_preferences import prefer as write_preferences

    total = len(KINDS) * (len(scenes.DOMAINS) * amounts["silo_preferences"] + amounts["public_preferences"])
    with progress("preferences", total, "pairs") as task:
        counts = write_preferences(load(config, overrides), out, Amounts(**amounts), task.advance)
    say(f"Wrote preferences of {', '.join(f'{name} {number}' for name, number in counts.items())} to {out}")


@world.command()
@click.argument("out", type=click.Path(path_type=Path), default=WEIGHTS)
@click.option("--seed", default=0, show_default=True, help="Seed of data and weights.")
@click.option("--language-steps", default=None, type=int, help="LLM's steps; by default the recipe's.")
@click.option("--vision-steps", default=None, type=int, help="Encoder's steps; by default the recipe's.")
def train(out: Path, seed: int, language_steps: int | None, vision_steps: int | None) -> None:
    """Train the tiny vision encoder and the tiny LLM from scratch.

    \b
    Example:
      fedcmp world train /tmp/weights
    """
    from fedcmp.pipeline.console import progress, say
    from fedcmp.pipeline.world import train as recipe

    def counter(name: str, steps: int) -> Callable[[int, float], None]:
        context = progress(name, steps, "steps")
        task = context.__enter__()

        def report(step: int, loss: float) -> None:
            task.advance()
            if step + 1 == steps:
                context.__exit__(None, None, None)

        return report

    accuracy = recipe.train(
        out,
        seed=seed,
        language_steps=language_steps or recipe.LANGUAGE_STEPS,
        vision_steps=vision_steps or recipe.VISION_STEPS,
        progress=counter,
    )
    for name, value in accuracy.items():
        say(f"{name}: {value}")
    say(f"Saved {out / 'clip'} and {out / 'llama'}")


@world.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="redrawn.png",
    show_default=True,
    help="Picture to write.",
)
@click.option("--pictures", default=4000, show_default=True, help="Pictures a decoder is trained on.")
@click.option("--held-out", default=600, show_default=True, help="Other pictures, to redraw.")
@click.option("--steps", default=1500, show_default=True, help="Steps a decoder is trained for.")
@click.option("--seed", default=0, show_default=True, help="Seed of pictures and decoders.")
def redraw(out: Path, pictures: int, held_out: int, steps: int, seed: int) -> None:
    """Redraw pictures from their cached features, to see what handing a cache over reveals.

    \b
    Example:
      fedcmp world redraw --out redrawn.png
    """
    from fedcmp.pipeline.console import progress, say, table
    from fedcmp.pipeline.world import redraw as inversion

    with progress("redraw", 4 * steps, "steps") as task:
        originals, results = inversion.redraw(
            WEIGHTS / "clip",
            pictures=pictures,
            held_out=held_out,
            steps=steps,
            seed=seed,
            report=task.advance,
        )
    inversion.save(out, originals, results)
    table(
        f"{held_out} held-out pictures redrawn from their features",
        ["stored as", "bytes", "variance explained", "PSNR", "original found"],
        [
            [each.way, f"{each.bytes:,}", f"{each.variance:.1%}", f"{each.psnr:.1f} dB", f"{each.found:.1%}"]
            for each in results
        ],
    )
    say(f"{out}: originals, then what was redrawn, a row each in the table's order")
