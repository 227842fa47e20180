"""What a site may say: checked for form, types and shapes before anything is computed from it.

A site is another institution's machine. Whatever it sends that is not of this form is its own failure,
and nobody else's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError
from torch import Tensor

from fedcmp.federate.arithmetic.updates import Sent
from fedcmp.federate.engines.base import SiloCard
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.pipeline.config import Communication, Experiment, Federate
from fedcmp.pipeline.hashes import canonical

# Of the widest encoders and LLMs there are, with room; a projector is allocated from them.
_WIDEST = 2**15
_MATRICES = 10_000
_MOMENTS = 3  # optimisers here keep up to two numbers a weight, and a few counters


def _number(value: Any) -> Any:
    # Pydantic also takes truth values, and tensors of one number.
    if type(value) not in (int, float):
        raise ValueError("no number")
    return value


_Number = Annotated[FiniteFloat, BeforeValidator(_number)]
_Count = Annotated[int, Field(ge=1, le=2**53), BeforeValidator(_number)]
_Width = Annotated[int, Field(ge=1, le=_WIDEST), BeforeValidator(_number)]
_Matrix = Annotated[str, Field(pattern=r"^lora\.[A-Za-z0-9_.]{1,200}$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


Form = TypeVar("Form", bound=_Strict)


class _Card(_Strict):
    content: _Digest
    key: dict[str, JsonValue]
    patches: _Count
    d_vision: _Width
    samples: _Count
    language: dict[str, JsonValue]
    left_out: Annotated[int, Field(ge=0, le=2**53), BeforeValidator(_number)]


class _Hello(_Strict):
    silo: str = Field(max_length=200)
    card: _Card
    terms: dict[str, JsonValue]
    d_llm: _Width
    adapter: Annotated[dict[_Matrix, list[_Width]], Field(max_length=_MATRICES)] = Field(default_factory=dict)


class _Result(_Strict):
    client: str
    state: dict[str, Tensor]
    loss: _Number | None
    samples: _Count
    steps: _Count
    tokens: _Count | None
    seconds: Annotated[_Number, Field(ge=0)] | None
    optimizer: dict[str, Any] | None
    gradient: dict[str, Tensor] | None
    alignment: dict[str, _Number] | None
    recalled: bool
    sent: dict[str, dict[str, Tensor]] | None
    releases: _Count
    flops: Annotated[_Number, Field(ge=0)] | None


class _Trained(_Strict):
    result: _Result


class _Stepped(_Strict):
    answer: dict[str, Any]


def hello(said: Any) -> tuple[str, SiloCard, dict[str, Any], int, dict[str, tuple[int, ...]]]:
    """A site's silo, its card, what it has agreed to, the width of its LLM, and the shapes of its adapter.

    Raises:
        ValueError: It is no greeting.
    """
    read = _read(_Hello, said)
    for each in (read.card.key, read.card.language, read.terms):
        canonical(each)  # refuses what JSON cannot say
    shapes = {name: tuple(shape) for name, shape in read.adapter.items()}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError("its adapter is not one of matrices")
    return read.silo, SiloCard(**read.card.model_dump()), read.terms, read.d_llm, shapes


def stepped(said: Any) -> dict[str, Any]:
    """A site's answer to a step of a secure round; what is in it is checked where it is used.

    Raises:
        ValueError: It is none.
    """
    return _read(_Stepped, said).answer


def trained(said: Any, job: Job, card: SiloCard, experiment: Experiment) -> LocalResult:
    """A site's answer to a job.

    Args:
        said: The answer.
        job: The job.
        card: What the site said of itself in the beginning.
        experiment: What was agreed to.

    Raises:
        ValueError: It cannot be one.
    """
    result, options = _read(_Trained, said).result, experiment.federate
    if result.samples > card.samples:
        raise ValueError(f"{result.samples} samples, where it has {card.samples}")
    if result.steps > result.samples:
        raise ValueError(f"{result.steps} steps with {result.samples} samples")
    for name in ("loss", "tokens", "seconds", "flops"):
        if (getattr(result, name) is None) != (options.clipped is not None):
            raise ValueError(f"its {name} is {getattr(result, name)}")
    if result.tokens is not None and result.tokens > result.samples * experiment.language.max_length:
        raise ValueError(f"{result.tokens} tokens in {result.samples} samples")
    _check_tensors(result, job, options)
    fields = {name: getattr(result, name) for name in _Result.model_fields}
    # A site speaks for its own silo alone.
    return LocalResult(**fields | {"client": job.client})


def _read(form: type[Form], said: Any) -> Form:
    try:
        return form.model_validate(said)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))[:80] or "all of it"
        raise ValueError(f"{place}: {problem['msg'][:120]}") from None


def _check_tensors(result: _Result, job: Job, options: Federate) -> None:
    whole = not options.secure and options.communication is None
    _same(result.state, job.start if whole else {}, "its projector")
    if options.secure or options.communication is None:
        if result.sent is not None:
            raise ValueError("a compressed update that nobody asked for")
    elif result.sent is None:
        raise ValueError("no compressed update")
    else:
        _check_sent(result.sent, job, options.communication)
    if result.gradient is not None:
        _same(result.gradient, job.start if _may(options, job, "gradient") else {}, "its gradient")
    if result.alignment is not None:
        matrices = {name for name, old in job.start.items() if old.ndim == 2}
        _keys(result.alignment, matrices if _may(options, job, "alignment") else (), "its alignment")
    if result.optimizer is not None:
        if not options.optimizer.carry or options.secure:
            raise ValueError("moments that nobody asked for")
        numbers = sum(tensor.numel() for tensor in _tensors(result.optimizer))
        most = _MOMENTS * sum(old.numel() for old in job.start.values())
        if numbers > most:
            raise ValueError(f"moments of {numbers} numbers, more than {most}")


def _may(options: Federate, job: Job, what: str) -> bool:
    return what in job.wants and not options.secure


def _keys(found: Collection[str], expected: Collection[str], what: str) -> None:
    if set(found) != set(expected):
        raise ValueError(f"{what} has {len(found)} other parts than the {len(expected)} expected")


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    _keys(found, expected, what)
    for name, old in expected.items():
        _like(found[name], tuple(old.shape), old.dtype, f"{what}'s {name}")


def _like(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{what} is {_described(tensor.dtype, tensor.shape)}, not {_described(dtype, shape)}"
        )
    if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has values that are not finite")


def _described(dtype: torch.dtype, shape: Collection[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"


def _check_sent(sent: Sent, job: Job, options: Communication) -> None:
    """What `outgoing.compression.compressed` makes of an update of these shapes."""
    _keys(sent, job.start, "its update")
    for name, old in job.start.items():
        parts, what, shape = sent[name], f"its update's {name}", tuple(old.shape)
        if options.payload == "bfloat16":
            expected = {"whole": (shape, torch.bfloat16)}
        elif options.payload == "int8":
            expected = {"levels": (shape, torch.int8), "scale": ((*shape[:-1], 1), torch.float32)}
        elif old.ndim != 2 or options.rank * sum(shape) >= old.numel():
            expected = {"whole": (shape, torch.float32)}
        else:
            rank = parts["left"].shape[-1] if "left" in parts and parts["left"].ndim == 2 else 0
            if not 1 <= rank <= options.rank:
                raise ValueError(f"{what} is not of rank {options.rank}")
            expected = {
                "left": ((shape[0], rank), torch.float32),
                "right": ((shape[1], rank), torch.float32),
            }
        _keys(parts, expected, what)
        for part, (size, dtype) in expected.items():
            _like(parts[part], size, dtype, f"{what}'s {part}")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    each = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in each for tensor in _tensors(part)]


def number(value: Any, least: float, most: float) -> float:
    """A finite number within bounds.

    Raises:
        ValueError: It is none.
    """
    if type(value) not in (int, float) or not isfinite(value) or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]} is not a number from {least:g} to {most:g}")
    return float(value)
