"""Rotary frequencies in configurations: transformers 5 and its predecessors spell them differently."""

from __future__ import annotations

from typing import Any


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """An LLM's configuration with its frequencies also under the names that transformers 4 reads.

    Version 4 ignores `rope_parameters` and would silently take the default frequencies.
    """
    rope = config.get("rope_parameters")
    if not rope or "rope_theta" in config:
        return config
    whole = rope.get("full_attention", rope)
    scaling = {name: value for name, value in whole.items() if name != "rope_theta"}
    older = {
        "rope_theta": whole["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return config | older
