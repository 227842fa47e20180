"""What an experiment file may say, as frozen models; an unknown key is an error.

Paths are relative to the working directory, but those of plugins.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fedcmp.pipeline.align import Align
from fedcmp.pipeline.options import Component, Name, Options
from fedcmp.pipeline.privacy import Ledger, Privacy
from fedcmp.pipeline.remote import is_url


class Extract(Options):
    """Stage one.

    `dtype` is what is stored, `compute_dtype` what the encoder computes in; `auto` is bfloat16 on
    CUDA and float32 on the CPU. `int8` halves a cache; its manifest says what that costs. `licence`
    stands in the manifests, for those who receive the caches. `shard_mb` sets the size of a file of features
    in place of `shard_images`: fewer and larger files where features are small.
    """

    encoder: Component
    silos: dict[Name, Component] = Field(min_length=1)
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    shard_images: int = Field(256, ge=1)
    shard_mb: float | None = Field(None, gt=0)
    batch_size: int = Field(64, ge=1)
    workers: int = Field(4, ge=1)
    licence: str | None = None


class Language(Options):
    """The frozen LLM and how records become prompts.

    `template` writes training texts and captions, `question_template` writes questions. `quantize`
    holds the LLM's weights in 8 bits, or in 4 (NF4); `device_map = "auto"` spreads its layers over all
    GPUs, and main memory after them.
    """

    path: Path
    template: Literal["plain", "chat", "v1"] = "plain"
    question_template: Literal["chat", "v1"] = "chat"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantize: Literal["none", "8bit", "4bit"] = "none"
    device_map: Literal["none", "auto"] = "none"
    max_length: int = Field(2048, ge=8)


class Optimizer(Options):
    """Local optimisation; `warmup` is a share of the run, the rest follows a cosine to zero.

    `carry` keeps a client's moments from round to round instead of starting afresh.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    warmup: float = Field(0.03, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    carry: bool = False


class Lora(Options):
    """LoRA beside the frozen LLM's linear layers, which is trained and aggregated with the projector.

    Matrices of `rank` count `alpha` / `rank` times. `targets` are names of layers, as in peft, or all but
    the head. `learning_rate` is the adapter's own, by default that of the optimiser.
    """

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    learning_rate: float | None = Field(None, gt=0)


class Communication(Options):
    """How a client's update travels.

    `bfloat16` takes half the bytes of `float32`, `int8` a quarter, and `low_rank` what matrices of `rank`
    need. What is lost on the way is kept by the client and sent with later updates.
    """

    payload: Literal["float32", "bfloat16", "int8", "low_rank"] = "float32"
    rank: int = Field(8, ge=1)


class Poison(Options):
    """A bad site, for research: what it sends, and how many times the size of its update."""

    kind: Literal["captions", "scaled", "sign_flipped", "random", "not_finite"]
    scale: float = Field(1.0, gt=0)


class Federate(Options):
    """Stage two: one pass over every silo's training texts, or `passes`, split evenly over its rounds.

    Every pass has an order of its own. `clients_per_round` silos take part in a round, all by default.
    Samples of `together` clients go through the LLM at once, in micro-batches of `micro_batch` samples of
    similar length (`batch_size` by default): faster for small models, equal up to rounding. `micro_tokens` is
    how many tokens a micro-batch may have, visual ones and padding included: where texts differ in length,
    many short ones or a few long ones fill a GPU alike. `initial` is what the projector starts from instead
    of random weights: a LLaVA `mm_projector.bin`, a directory of Hugging Face's LLaVA, or a run or projector
    of ours. `checkpointing` keeps only the inputs of the LLM's layers for the backward pass and runs them
    again in it: a third of the memory, a third slower. `compile` trains through torch.compile: a third faster
    on GPUs, equal up to rounding.
    `all_reduce` says how many processes torchrun starts, where their gradients are to be added as is fastest;
    by default they are added in one order, and a run ends in the same bytes for any number of them. `shard`
    spreads the LLM's layers over these processes, for LLMs that no GPU has room for: equal up to rounding.
    `aggregation` is where the server multiplies and decomposes matrices, equal up to rounding. With `adapter`
    the LLM is tuned, too.
    """

    silos: tuple[Name, ...] = Field(min_length=1)
    rounds: int = Field(10, ge=0)
    passes: int = Field(1, ge=1)
    clients_per_round: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1)
    together: int = Field(1, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    micro_tokens: int | None = Field(None, ge=1)
    checkpointing: bool = False
    compile: bool = False
    aggregation: Literal["cpu", "cuda"] = "cpu"
    all_reduce: int | None = Field(None, ge=2)
    shard: bool = False
    projector: Component = Field(default_factory=lambda: Component(name="mlp2x_gelu"))
    adapter: Lora | None = None
    initial: Path | None = None
    optimizer: Optimizer = Optimizer()
    strategy: Component = Field(default_factory=lambda: Component(name="fedavg"))
    privacy: Privacy | None = None
    poison: dict[Name, Poison] | None = None
    communication: Communication | None = None

    def as_identity(self, *without: str) -> dict[str, Any]:
        """JSON value as identities hold it: what is newer than they are is in it only where it is used.

        Args:
            without: Options to leave out.
        """
        newer = {
            "passes": 1,
            "aggregation": "cpu",
            "all_reduce": None,
            "shard": False,
            "adapter": None,
            "micro_tokens": None,
        }
        unused = {name for name, without_it in newer.items() if getattr(self, name) == without_it}
        return self.model_dump(mode="json", exclude={*without, *unused})

    @property
    def secure(self) -> bool:
        """Whether clients keep their updates."""
        return self.privacy is not None and self.privacy.secure

    @property
    def clipped(self) -> Privacy | None:
        """How updates or gradients are clipped and noised, if they are."""
        return self.privacy if self.privacy is not None and self.privacy.clip is not None else None

    @field_validator("privacy")
    @classmethod
    def _no_privacy_is_none(cls, value: Privacy | None) -> Privacy | None:
        return None if value == Privacy() else value

    @field_validator("poison")
    @classmethod
    def _no_poison_is_none(cls, value: dict[Name, Poison] | None) -> dict[Name, Poison] | None:
        return value or None

    @field_validator("communication")
    @classmethod
    def _default_is_none(cls, value: Communication | None) -> Communication | None:
        return None if value is None or value.payload == "float32" else value

    @model_validator(mode="after")
    def _poisoned_are_silos(self) -> Federate:
        strangers = sorted(set(self.poison or {}) - set(self.silos))
        if strangers:
            raise ValueError(f"poison names {', '.join(strangers)}, which are none of the silos")
        return self

    @field_validator("silos")
    @classmethod
    def _named_once(cls, silos: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in silos if silos.count(name) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} more than once")
        return silos


class Sites(Options):
    """Rounds over real sites; none of this decides what a run in which all take part ends in.

    A round waits `round_timeout` seconds for its sites and goes on without those that did not answer, or
    sent no finite numbers, if `quorum` of them did, all by default. A run waits `join_timeout` seconds for
    its sites to appear.
    """

    quorum: int | None = Field(None, ge=1)
    round_timeout: float = Field(3600.0, gt=0)
    join_timeout: float = Field(600.0, gt=0)


class Evaluate(Options):
    """Stage three: benchmarks by name, over the cached features of one silo of images."""

    silo: Name | None = None
    images: Path | None = None
    batch_size: int = Field(64, ge=1)
    bootstrap: int = Field(2000, ge=100)
    benchmarks: dict[Name, Component] = Field(default_factory=dict)


class Memo(Options):
    """Where local updates are remembered, so that runs share equal training; in bytes at most."""

    path: Path
    limit: int = Field(2_000_000_000, ge=1_000_000)


class Experiment(Options):
    """One experiment file.

    Caches lie in `features`, with `store` also behind a URL, of which `features` is then a verified
    copy. A URL in `features` is short for that with a folder in `$FEDCMP_CACHE` or `~/.cache/fedcmp`.
    `trust` gives silos a public key: their caches are used only as signed by its owner, as that silo's.
    `plugins` are Python files with further components, from the folder of the file that names them.
    `tracker` is sent every round's figures, too.
    """

    experiment: Name
    run: Name
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    features: Path = Path("build/features")
    store: str | None = None
    build: Path = Path("build")
    memo: Memo | None = None
    tracker: Literal["tensorboard", "wandb", "mlflow", "trackio"] | None = None
    plugins: tuple[Path, ...] = ()
    ledger: Ledger = Ledger()
    extract: Extract
    language: Language
    federate: Federate
    align: Align | None = None
    trust: dict[Name, Path] = Field(default_factory=dict)
    sites: Sites = Sites()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="before")
    @classmethod
    def _mirrored(cls, values: Any) -> Any:
        if isinstance(values, dict) and is_url(values.get("features")):
            url = values["features"]
            return {**values, "features": _mirror_path(url), "store": values.get("store", url)}
        return values

    @field_validator("store")
    @classmethod
    def _store_is_url(cls, store: str | None) -> str | None:
        if store is not None and not is_url(store):
            raise ValueError("expected a URL such as s3://bucket/prefix")
        return store

    @model_validator(mode="after")
    def _trusted_are_silos(self) -> Experiment:
        known = {*self.extract.silos, *self.federate.silos, *self.evaluate.benchmarks, self.evaluate.silo}
        known |= set(self.align.prompts if self.align else ())
        known |= {(each.model_extra or {}).get("silo") for each in self.evaluate.benchmarks.values()}
        strangers = sorted(self.trust.keys() - known)
        if strangers:
            raise ValueError(f"trust names {', '.join(strangers)}, which this experiment does not use")
        return self

    def cache_path(self, silo: str) -> Path:
        """Where a silo's feature cache lies."""
        return self.features / f"{silo}.zarr"

    @property
    def run_path(self) -> Path:
        """Where stage two writes this run."""
        return self.build / "runs" / self.experiment / self.run

    @property
    def scores_path(self) -> Path:
        """Where stage three writes this run's answers and scores."""
        return self.build / "scores" / self.experiment / self.run

    @property
    def report_path(self) -> Path:
        """Where the report of all runs of the experiment is written."""
        return self.build / "report" / self.experiment


def _mirror_path(url: str) -> Path:
    root = os.environ.get("FEDCMP_CACHE") or Path.home() / ".cache" / "fedcmp"
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", url)
    return Path(root) / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
