"""Train both frozen models of the embedded default and save them as ordinary model directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.pipeline.files import write_json
from fedcmp.pipeline.world import models, train_language, train_vision

LANGUAGE_STEPS = 5000
VISION_STEPS = 2000
_HELD_OUT_SEED = 10_000


def train(
    out: Path,
    *,
    seed: int,
    language_steps: int,
    vision_steps: int,
    progress: Callable[[str, int], Callable[[int, float], None]],
) -> dict[str, Any]:
    """Train and save `<out>/clip` and `<out>/llama`.

    Returns:
        Held-out accuracies, also written to `<out>/report/accuracy.json`.
    """
    import torch

    torch.manual_seed(seed)
    vision, processor = models.clip_vision(), models.image_processor()
    accuracy: dict[str, Any] = {
        "seed": seed,
        "language_steps": language_steps,
        "vision_steps": vision_steps,
        "cells": train_vision.train(
            vision,
            processor,
            seed=seed + 2,
            steps=vision_steps,
            report=progress("vision encoder", vision_steps),
        ),
    }
    vision.save_pretrained(out / "clip")
    processor.save_pretrained(out / "clip")

    torch.manual_seed(seed)
    tokenizer = models.tokenizer()
    language = models.llama(
        len(tokenizer), bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id
    )
    train_language.train(
        language,
        tokenizer,
        seed=seed + 1,
        steps=language_steps,
        report=progress("language model", language_steps),
    )
    for name, as_text in (("yes_no_from_text", True), ("yes_no_from_word_bags", False)):
        accuracy[name] = train_language.answer_accuracy(
            language, tokenizer, np.random.default_rng(_HELD_OUT_SEED), as_text=as_text, number=4000
        )
    language.save_pretrained(out / "llama")
    tokenizer.save_pretrained(out / "llama")
    write_json(out / "report" / "accuracy.json", accuracy)
    return accuracy
