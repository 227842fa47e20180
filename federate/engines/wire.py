"""Messages between server and sites as bytes: JSON, and safetensors for what is in it of tensors.

Nothing received is ever executed, as pickled objects would be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedcmp.federate.arithmetic.updates import Objective
from fedcmp.federate.messages import Job, LocalResult

_TENSOR, _ITEMS = "$tensor", "$items"


@dataclass(frozen=True)
class Payload:
    """A message on its way.

    Attributes:
        text: JSON with a reference in place of every tensor.
        tensors: The tensors as safetensors.
    """

    text: str
    tensors: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.text.encode()) + len(self.tensors)


def pack(value: Any) -> Payload:
    """Bytes of nested dicts, lists, plain values and tensors.

    Raises:
        TypeError: There is something else in it.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {_TENSOR: name}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: plain(each) for key, each in value.items()}
            return {_ITEMS: [[key, plain(each)] for key, each in value.items()]}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return value

    text = json.dumps(plain(value))
    return Payload(text, save(tensors))


def unpack(payload: Payload) -> Any:
    """The inverse of `pack`; tuples come back as lists.

    Raises:
        ValueError: The bytes are no such message.
    """
    try:
        tensors = load(payload.tensors)

        def rich(value: Any) -> Any:
            if isinstance(value, dict):
                if _TENSOR in value:
                    return tensors[value[_TENSOR]]
                if _ITEMS in value:
                    return {key: rich(each) for key, each in value[_ITEMS]}
                return {key: rich(each) for key, each in value.items()}
            return [rich(each) for each in value] if isinstance(value, list) else value

        return rich(json.loads(payload.text, parse_constant=_refused))
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a message of this format: {error}") from None
    except RecursionError:
        raise ValueError("not a message of this format: nested too deep") from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def job_as_dict(job: Job) -> dict[str, Any]:
    """A job as nested dicts."""
    parts = {field.name: getattr(job, field.name) for field in fields(Job)}
    return parts | {"objective": dict(vars(job.objective)), "wants": sorted(job.wants)}


def job_of(parts: dict[str, Any]) -> Job:
    """The inverse of `job_as_dict`."""
    return Job(**parts | {"objective": Objective(**parts["objective"]), "wants": frozenset(parts["wants"])})


def result_as_dict(result: LocalResult) -> dict[str, Any]:
    """A result as a dict."""
    return {field.name: getattr(result, field.name) for field in fields(LocalResult)}


def result_of(parts: dict[str, Any]) -> LocalResult:
    """The inverse of `result_as_dict`."""
    return LocalResult(**parts)
