"""The round loop: broadcast, train every client, aggregate, checkpoint."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from federate import history
from federate.batches import Stream
from federate.client import train_locally
from federate.strategies.base import Memory, State, Strategy, Update, check
from pipeline.config import Optimizer
from pipeline.errors import UserError
from pipeline.language import FrozenLanguageModel
from pipeline.manifest import write_atomic


@dataclass
class Progress:
    """All that a run carries from round to round; a checkpoint is just this.

    Random order is derived from the seed and names, never from a running generator, so there is
    no generator state to keep.
    """

    state: State
    round: int = 0
    memory: Memory = field(default_factory=dict)
    personal: dict[str, State] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write a checkpoint atomically."""
        buffer = io.BytesIO()
        torch.save({"fingerprint": fingerprint, **vars(self)}, buffer)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Progress | None:
        """Read a checkpoint, or None where there is none of this configuration.

        Raises:
            UserError: The file is no checkpoint.
        """
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, weights_only=True)
            ours = saved.pop("fingerprint") == fingerprint
        except Exception:
            raise UserError(f"{path}: damaged, not a checkpoint; delete it to train from the start") from None
        return cls(**saved) if ours else None


def run_rounds(
    progress: Progress,
    projector: nn.Module,
    language: FrozenLanguageModel,
    streams: Mapping[str, Stream],
    strategy: Strategy,
    options: Optimizer,
    *,
    rounds: int,
    history_path: Path,
    checkpoint: Callable[[Progress], None],
    advance: Callable[[], None],
) -> Progress:
    """Run what is left of the rounds.

    Args:
        progress: Where to go on.
        projector: Scratch module on the LLM's device.
        language: The frozen LLM, shared by all clients.
        streams: Each client's data.
        strategy: How to aggregate.
        options: Local optimisation.
        rounds: Rounds in all.
        history_path: JSON lines to append to.
        checkpoint: Called after every round.
        advance: Called after every local step.

    Returns:
        The progress after the last round.
    """
    history.truncate(history_path, progress.round)
    for round_ in range(progress.round, rounds):
        updates: list[Update] = []
        rows: list[dict[str, Any]] = []
        personal, optimizers = dict(progress.personal), {}
        for client, stream in streams.items():
            start = progress.personal.get(client, progress.state)
            result = train_locally(
                projector,
                start,
                language,
                stream.batches(round_),
                options,
                first_step=sum(stream.steps(earlier) for earlier in range(round_)),
                total_steps=sum(stream.steps(each) for each in range(rounds)),
                optimizer_state=progress.optimizers.get(client),
                advance=advance,
            )
            updates.append(Update(client, result.state, result.samples))
            if strategy.personal:
                personal[client] = result.state
            if options.carry:
                optimizers[client] = result.optimizer
            rows.append(
                {
                    "round": round_,
                    "client": client,
                    "loss": result.loss,
                    "samples": result.samples,
                    "tokens": result.tokens,
                    "seconds": round(result.seconds, 3),
                    "update_norm": history.distance(result.state, start),
                }
            )
        check(progress.state, updates)
        aggregate = strategy.aggregate(progress.state, updates, progress.memory)
        for row in rows:
            row |= {name: figure[row["client"]] for name, figure in aggregate.figures.items()}
        moved = history.distance(aggregate.state, progress.state)
        tokens = sum(row["tokens"] for row in rows)
        rows.append(
            {
                "round": round_,
                "client": None,
                "loss": sum(row["loss"] * row["tokens"] for row in rows) / max(tokens, 1),
                "samples": sum(row["samples"] for row in rows),
                "tokens": tokens,
                "seconds": round(sum(row["seconds"] for row in rows), 3),
                "update_norm": moved,
            }
        )
        history.append(history_path, rows)
        progress = Progress(aggregate.state, round_ + 1, aggregate.memory, personal, optimizers)
        checkpoint(progress)
    return progress
