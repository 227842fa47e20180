"""`fedcmp`: the list of commands, and how whatever goes wrong in them ends."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import warnings
from typing import Any

import click

# Each is in the module of its name in `commands`, which is imported when it is called.
COMMANDS = {
    "demo": "Run the embedded default from data to report in a folder.",
    "init": "Write an experiment file from what lies in a folder.",
    "convert": "Write a GGUF file's LLM as a directory that transformers loads.",
    "show": "Print an experiment with every default written out.",
    "plan": "Estimate disk, GPU hours and memory before there are any data.",
    "extract": "Encode every silo's images once and cache their patch features.",
    "partition": "Split one data set into silos.",
    "federate": "Train the projector federatedly from the caches.",
    "align": "Align a trained projector with what the silos prefer.",
    "site": "Hold a silo ready to train for a server elsewhere.",
    "merge": "Merge trained projectors into one, without training.",
    "benchmarks": "List the benchmarks and their options.",
    "evaluate": "Answer the benchmarks and score the answers.",
    "score": "Score saved answers again; no model is needed.",
    "compare": "Test whether one run is better than another.",
    "report": "Compare the runs of an experiment on one page.",
    "export": "Export a projector for Hugging Face or LLaVA.",
    "cache": "Inspect, verify and hand over feature caches.",
    "ablate": "Compare strategies over scenarios and seeds.",
    "world": "Write the embedded default's data, or train its models.",
}


class Terminated(KeyboardInterrupt):
    """Somebody sent SIGTERM."""


def _terminated(number: int, frame: object) -> None:
    raise Terminated


class StageCommands(click.Group):
    """A group whose help needs no import and whose user errors are one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of the stages."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"fedcmp.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands from the table above, so that none is imported."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for an unknown one."""
        from fedcmp.pipeline.errors import did_you_mean

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command is called '{args[0]}'{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Turn mistakes of the user and of the machine into one line and exit code 2."""
        from fedcmp.pipeline.errors import UserError

        before = signal.getsignal(signal.SIGTERM)
        try:
            # What cleans up after Ctrl-C does so as well when a scheduler or a service manager ends it.
            signal.signal(signal.SIGTERM, _terminated)
            return super().invoke(ctx)
        except UserError as error:
            _complain(f"fedcmp: {error}")
        except BrokenPipeError:
            # Whoever read what is printed has seen enough, as `head` has; click ends without a word.
            raise
        except OSError as error:
            hint = "; free some space and rerun to go on" if error.errno == errno.ENOSPC else ""
            _complain(f"fedcmp: {error}{hint}")
        except KeyboardInterrupt as stop:
            _complain("fedcmp: interrupted; run the same command to go on")
            ctx.exit(143 if isinstance(stop, Terminated) else 130)
        finally:
            signal.signal(signal.SIGTERM, before)
        ctx.exit(2)


def _complain(text: str) -> None:
    from fedcmp.pipeline.console import complain

    complain(text)


@click.command(cls=StageCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedcmp")
def main() -> None:
    """Federated pre-training of the projector of a multimodal LLM, on cached features.

    \b
    Example:
      fedcmp extract configs/demo.toml
      fedcmp federate configs/demo/fedcmp.toml
      fedcmp evaluate configs/demo/fedcmp.toml
    """


def run() -> None:
    """`fedcmp` from a terminal: what other packages announce is for tests to tell, not for users."""
    if not sys.warnoptions:
        announcements = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
        for category in announcements:
            warnings.simplefilter("ignore", category)
        # Damaged EXIF data and their kin, once a picture; whatever matters about a picture is counted.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        # Processes that are started from here are this command, too.
        os.environ["PYTHONWARNINGS"] = ",".join(f"ignore::{each.__name__}" for each in announcements)
    main()


if __name__ == "__main__":
    run()
