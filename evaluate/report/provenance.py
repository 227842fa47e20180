"""What a run was made of, in words: from its manifest and its history alone."""

from __future__ import annotations

from typing import Any

from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.run_folder import Run

_HASH = 12
_HASHED = ("files", "config", "format", "preprocessing")


def facts_of(experiment: Experiment, run: Run) -> dict[str, str]:
    """Facts in the order of the stages; hashes are the first 12 digits of SHA-256.

    Args:
        experiment: For the name of the LLM's directory, which is no part of a run's identity.
        run: The finished run.
    """
    manifest, history = run.manifest, run.history
    federate, language = run.identity.get("federate", {}), run.identity.get("language", {})
    features, made_by = manifest.get("features", {}), manifest.get("made_by", {})
    key = features.get("key", {})
    encoder = key.get("encoder", {})
    facts = {
        "strategy": manifest["strategy"],
        "options of the strategy": _options(federate.get("strategy", {})),
        "projector": _named(federate.get("projector", {})),
        "encoder": f"{encoder.get('name', '-')}, {_options(encoder)}",
        "encoder's content": _hash({name: encoder[name] for name in _HASHED if name in encoder}),
        "features": f"{features.get('patches', '-')} visual tokens, {key.get('dtype', '-')}",
        "LLM": experiment.language.path.name,
        "LLM's content": _hash(language.get("files")),
        "LLM's form": _options({name: each for name, each in language.items() if name != "files"}),
        "silos": _silos(manifest),
        "rounds": str(federate.get("rounds", "-")),
        "clients a round": str(federate.get("clients_per_round", "-")),
        "batch size": str(federate.get("batch_size", "-")),
        "optimizer": _named(federate.get("optimizer", {})),
        "seed": str(run.identity.get("seed", "-")),
        "alignment": _alignment(run.identity.get("align") or {}),
        "privacy": _privacy(federate, history),
        "communication": _options(federate.get("communication") or {}) or "float32",
        "exchanged": _traffic(history),
        "absences": _absences(history),
        "training time": _time(history),
        "poisoned": _options(federate.get("poison") or {}) or "no",
        "initial weights": str(federate.get("initial", "random"))[:_HASH],
        "run": manifest.get("fingerprint", "-")[:_HASH],
        "software": ", ".join(f"{name} {each}" for name, each in made_by.get("packages", {}).items()),
        "machine": ", ".join(
            [f"Python {made_by.get('python', '-')}", made_by.get("platform", "-"), made_by.get("device", "-")]
        ),
    }
    return {name: text or "-" for name, text in facts.items()}


def _hash(content: Any) -> str:
    return fingerprint(content)[:_HASH] if content else "-"


def _options(options: dict[str, Any]) -> str:
    """Options as `name = value`, without those that are only hashes or off."""
    return ", ".join(
        f"{name} = {value}"
        for name, value in options.items()
        if name not in ("name", *_HASHED) and value not in (None, False)
    )


def _named(options: dict[str, Any]) -> str:
    return ", ".join(filter(None, [str(options.get("name", "-")), _options(options)]))


def _alignment(align: dict[str, Any]) -> str:
    if not align:
        return "none"
    rewards = ", ".join(dict.fromkeys(_named(each) for each in align["rewards"].values()))
    rest = {name: each for name, each in align.items() if name not in ("rewards", "router", "prompts")}
    prompts = ", ".join(align["prompts"])
    return f"{_options(rest)}; prompts: {prompts}; rewards: {rewards}; router: {_named(align['router'])}"


def _silos(manifest: dict[str, Any]) -> str:
    texts = manifest.get("texts", {})
    left_out = sum(counts["left_out"] for counts in texts.values())
    total = f"{len(texts)} with {sum(counts['samples'] for counts in texts.values()):,} texts"
    return total + (f", {left_out:,} left out" if left_out else "")


def _privacy(federate: dict[str, Any], history: list[dict[str, Any]]) -> str:
    options = federate.get("privacy") or {}
    if not options:
        return "none"
    spent = [row["epsilon"] for row in history if row["client"] is None and row.get("epsilon") is not None]
    epsilon = [f"epsilon = {spent[-1]:.2f} at delta = {options.get('delta', 0):g}"] if spent else []
    return ", ".join([*epsilon, _options({n: each for n, each in options.items() if n != "epsilon"})])


def _traffic(history: list[dict[str, Any]]) -> str:
    rows = [row for row in history if row["client"] is None]
    sent = sum(row.get("bytes") or 0 for row in rows)
    received = sum(row.get("bytes_received") or 0 for row in rows)
    if not sent:
        return "nothing, trained on one machine"
    return f"{_bytes(sent)}, of it {_bytes(received)} from clients"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _absences(history: list[dict[str, Any]]) -> str:
    """How often each client was asked and did not answer."""
    missing = [client for row in history for client in row.get("missing") or []]
    if not missing:
        return "none"
    counts = {client: missing.count(client) for client in dict.fromkeys(missing)}
    return ", ".join(f"{client} in {number} rounds" for client, number in counts.items())


def _time(history: list[dict[str, Any]]) -> str:
    seconds = sum(row.get("seconds") or 0 for row in history if row["client"])
    return f"{seconds:,.0f} s of clients" if seconds else "-"
