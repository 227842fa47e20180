"""FedDPO, and FedAvg on what was chosen: what a mixture of rewards is compared with."""

from __future__ import annotations

from collections.abc import Callable

from fedcmp.federate.preference.jury import Jury, mean_state
from fedcmp.federate.preference.progress import Progress
from fedcmp.pipeline import history
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress


def average(experiment: Experiment, jury: Jury, done: Progress, save: Callable[[], None]) -> None:
    """Rounds in which every silo trains the policy and the mean goes on; `done` is changed.

    Args:
        experiment: The experiment.
        jury: Reaches the silos.
        done: Where to go on.
        save: Writes a checkpoint of it.
    """
    assert experiment.align is not None
    rounds, rows = experiment.align.average, experiment.run_path / history.HISTORY
    with progress(experiment.run, rounds - done.step, "rounds") as task:
        while done.step < rounds:
            states, losses = jury.tuned(done.state, done.step)
            done.state = mean_state(states, jury.samples)
            told = [
                {
                    "round": done.step,
                    "client": c,
                    "loss": losses[c],
                    "samples": jury.samples[c],
                    "seconds": None,
                }
                for c in jury.clients
            ]
            history.append(rows, [{"round": done.step, "client": None}, *told])
            task.advance()
            task.note(f"loss {sum(losses.values()) / len(losses):.3f}")
            done.step += 1
            save()
