"""On CUDA sums have one order; what has none there is said, and done all the same."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcmp.federate.client import trainer as local
from fedcmp.federate.client.trainer import Trainer
from fedcmp.pipeline.models.device import in_one_order, peak
from fedcmp.pipeline.models.vision_language import VisionLanguage


@pytest.mark.parametrize(("device", "strict"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_one_order_is_asked_for_on_cuda_alone(
    device: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with in_one_order(device):
        assert torch.are_deterministic_algorithms_enabled() == strict
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == strict
    assert not torch.are_deterministic_algorithms_enabled()


def engine(language: Any) -> Trainer:
    options: Any = None
    return Trainer(
        {}, VisionLanguage(torch.nn.Identity(), language), options, 1, 1, 1, None, lambda steps: None
    )


def test_what_has_no_order_is_said_and_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = []

    def train(*words: Any, **options: Any) -> list[Any]:
        orders.append(torch.are_deterministic_algorithms_enabled())
        if orders[-1]:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return []

    monkeypatch.setattr(local, "train_together", train)
    language = SimpleNamespace(device=torch.device("cuda"))
    assert engine(language).train([]) == []
    assert orders == [True, False]
    assert "equal runs may end in different bytes here: cumsum" in capsys.readouterr().out


def test_other_errors_stay_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*words: Any, **options: Any) -> list[Any]:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(local, "train_together", train)
    with pytest.raises(RuntimeError, match="illegal"):
        engine(SimpleNamespace(device=torch.device("cuda"))).train([])


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", None),
        ("GRID A10G", None),
    ],
)
def test_peaks_by_name(name: str, flops: float | None) -> None:
    assert peak(name) == flops
