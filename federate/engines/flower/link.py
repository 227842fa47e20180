"""Flower, the engine for real sites.

A server app drives `Grid` directly: Flower's own strategies wait for ever where nodes are missing.
A client app is a new process for every message, so it only relays between its SuperNode and the
site's daemon, which holds the LLM, and imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.message.array import Array
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcmp.federate.engines.flower.daemon import SiteGoneError, ask
from fedcmp.pipeline.models.device import pick_device

if TYPE_CHECKING:
    from fedcmp.federate.engines.link import Failure
    from fedcmp.federate.engines.service import Service
    from fedcmp.federate.engines.wire import Payload
    from fedcmp.pipeline.config import Experiment

_KINDS = {"hello": "query", "train": "train"}
_REFUSED, _GONE = 900, 901
_OTHER_APP = 7  # Flower's own: the site would not run the app it was sent

Answer = Callable[["tuple[str, bytes]", Context, float], "tuple[str, bytes]"]


def _content(text: str, tensors: bytes) -> RecordDict:
    # One opaque array: Flower cuts it into pieces and sends a piece that many sites get only once.
    array = Array(dtype="uint8", shape=(len(tensors),), stype="safetensors", data=tensors)
    return RecordDict({"text": ConfigRecord({"json": text}), "tensors": ArrayRecord({"all": array})})


def _parts(content: RecordDict) -> tuple[str, bytes]:
    return str(content.config_records["text"]["json"]), content.array_records["tensors"]["all"].data


class FlowerLink:
    """Messages over a SuperLink, as `federate.engines.sites.Link` wants them."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> set[int]:
        """Connected SuperNodes."""
        return set(self._grid.get_node_ids())

    def send(self, node: int, kind: str, payload: Payload, seconds: float) -> str:
        """Push a message."""
        content = _content(payload.text, payload.tensors)
        message = Message(content, dst_node_id=node, message_type=_KINDS[kind], ttl=max(seconds, 1.0))
        (name,) = self._grid.push_messages([message])
        return str(name)

    def receive(self, messages: Iterable[str]) -> dict[str, Payload | Failure]:
        """Pull replies."""
        from fedcmp.federate.engines.link import Failure

        received: dict[str, Payload | Failure] = {}
        # One by one: an answer that Flower cannot put together is one site's failure.
        for name in messages:
            try:
                replies = list(self._grid.pull_messages([name]))
            except httpx.TransportError:
                raise
            except Exception as error:
                received[name] = Failure(f"sent an answer that cannot be put together ({error!r:.200})")
                continue
            for reply in replies:
                received[name] = _read(reply)
        return received


def _read(reply: Message) -> Payload | Failure:
    from fedcmp.federate.engines.link import Failure
    from fedcmp.federate.engines.wire import Payload

    if reply.has_error():
        # Besides our own: SuperNodes that are offline, messages that ran out of time.
        gone = reply.error.code not in (_REFUSED, _OTHER_APP)
        return Failure(reply.error.reason or "no reason given", gone)
    try:
        return Payload(*_parts(reply.content))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        return Failure(f"sent an answer of another app ({error!r:.200})")


def app_that_says(answer: Answer) -> ClientApp:
    """A client app with an answer to every message."""
    app = ClientApp()

    def reply(message: Message, context: Context) -> Message:
        try:
            content = _content(*answer(_parts(message.content), context, message.metadata.ttl))
        except SiteGoneError as error:
            return Message(Error(_GONE, str(error)), reply_to=message)
        except ValueError as error:
            return Message(Error(_REFUSED, str(error)), reply_to=message)
        return Message(content, reply_to=message)

    app.query()(reply)
    app.train()(reply)
    return app


def relay(parts: tuple[str, bytes], context: Context, seconds: float) -> tuple[str, bytes]:
    """The answer of the site's daemon."""
    return ask(Path(str(context.node_config["socket"])), parts, seconds)


def serve(grid: Grid, context: Context, load: Callable[[Path, Sequence[str]], Experiment]) -> None:
    """Run the experiment named in the run's configuration, read by `load`."""
    from fedcmp.pipeline.errors import UserError

    task: dict[str, Any] = {"overrides": [], "outcome": None}
    if context.run_config["task"]:
        task = json.loads(Path(str(context.run_config["task"])).read_text())
        threading.Thread(target=_end_with, args=(Path(task["alive"]),), daemon=True).start()
    try:
        experiment = load(Path(str(context.run_config["config"])), task["overrides"])
        _run(experiment, grid, _owners(task))
        problem = ""
    except (UserError, OSError) as error:
        if task["outcome"] is None:
            raise
        problem = str(error)
    if task["outcome"] is not None:
        Path(task["outcome"]).write_text(problem)


def _end_with(alive: Path) -> None:
    """End this process with the one that holds a lock; Flower's own watch takes its time to notice."""
    from fedcmp.pipeline.files import locked

    with locked(alive, str(alive), wait=True):
        os._exit(1)


def _owners(task: dict[str, Any]) -> dict[int, str] | None:
    """Silos by the node that their site's key stands for; None where sites have no keys."""
    owners = task.get("owners")
    return None if owners is None else {int(node): silo for node, silo in owners.items()}


def _run(experiment: Experiment, grid: Grid, owners: dict[int, str] | None) -> None:
    from fedcmp.federate.engines.sites import Sites
    from fedcmp.federate.run import run

    run(experiment, lambda own, _: Sites(own, FlowerLink(grid), owners))


def simulate(experiment: Experiment) -> None:
    """Run over Flower's simulation: every silo is a node, in processes of this machine.

    Raises:
        UserError: As for any run.
    """
    import torch
    from flwr.simulation import run_simulation

    app = ServerApp()
    app.main()(lambda grid, context: _run(experiment, grid, None))
    content = pickle.dumps(experiment)
    silos, threads = experiment.federate.silos, torch.get_num_threads()

    def answer(parts: tuple[str, bytes], context: Context, seconds: float) -> tuple[str, bytes]:
        return _simulated(parts, content, silos[int(context.node_config["partition-id"])], threads)

    run_simulation(
        app,
        app_that_says(answer),
        num_supernodes=len(silos),
        backend_config=_backend(
            experiment.federate.secure or experiment.align is not None, pick_device(experiment.device)
        ),
    )


def _backend(remembers: bool, device: str) -> dict[str, Any]:
    """What Ray gives every process that plays nodes: two cores, and a GPU of its own if there is one.

    Args:
        remembers: Whether a node needs what it was asked before, so that one process has to play them all.
        device: Where nodes compute.
    """
    resources = {"num_cpus": 2, "num_gpus": 0.0 if device == "cpu" else 1.0}
    gpus = int(resources["num_gpus"])
    alone = {"init_args": {"num_cpus": 2, "num_gpus": gpus}} if remembers else {}
    return alone | {"client_resources": resources}


def _simulated(parts: tuple[str, bytes], experiment: bytes, silo: str, threads: int) -> tuple[str, bytes]:
    import torch

    from fedcmp.federate.engines.flower.daemon import answered

    torch.set_num_threads(threads)  # Ray gives its processes fewer, which would round in another way
    return answered(_service(experiment, silo), parts)


@lru_cache
def _service(experiment: bytes, silo: str) -> Service:
    """A node's silo; kept in the process that plays the node, which shares the LLM among its nodes."""
    from fedcmp.federate.engines.service import Service

    return Service(pickle.loads(experiment), silo)
