"""Federated pre-training of the projector of multimodal LLMs, on cached features.

import fedcmp
study = fedcmp.load("configs/demo.toml", {"federate.rounds": 4})
study.extract()
run = study.federate()
scores = study.evaluate()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcmp.pipeline.world.demo import demo as demo
    from fedcmp.study import Scores as Scores
    from fedcmp.study import Study as Study
    from fedcmp.study import frame as frame
    from fedcmp.study import load as load

__all__ = ["Scores", "Study", "demo", "frame", "load"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # The command line shows its help without any of it.
    if name == "demo":
        from fedcmp.pipeline.world.demo import demo

        return demo
    if name in __all__:
        from fedcmp import study

        return getattr(study, name)
    raise AttributeError(f"module 'fedcmp' has no attribute '{name}'")
