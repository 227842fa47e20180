"""Which causal LMs are used in which way: the table of docs/language.md, from tiny models of each type.

python tests/language_table.py --write
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, save

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.proof import Ways

PAGE = Path(__file__).parent.parent / "docs" / "language.md"
_BEGIN, _END = "<!-- tests/language_table.py -->", "<!-- end -->"


def version() -> str:
    import transformers

    return transformers.__version__


def known() -> list[str]:
    """Architectures that this transformers has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [name for name in ARCHITECTURES if name.split(",")[0] in CONFIG_MAPPING_NAMES]


def load(name: str, folder: Path, tokenizer: Any) -> FrozenLanguageModel | str:
    """The LLM, or why it is refused."""
    save(name, folder, tokenizer)
    try:
        return FrozenLanguageModel(folder, dtype="float32", device="cpu")
    except UserError as error:
        return str(error)


def described(found: Ways | str) -> tuple[str, str]:
    """Two cells: where logits come from, and how prompts are answered."""
    if isinstance(found, str):
        why = re.sub(r"^language\.path = \S+: (a )?\S+ (model )?", "", found).split(";")[0]
        return "refused", why
    if not found.cached:
        answers = "without a cache"
    elif not found.padded:
        answers = "cache; prompts of one length together"
    else:
        answers = "cache; all prompts together" + (", an image's tokens once" if found.shared else "")
    return ("whole model" if found.whole else "decoder and head"), answers


def table(found: dict[str, Ways | str]) -> str:
    """Markdown of what was found, model types of one kind together."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, each in found.items():
        rows.setdefault(described(each), []).append(name.replace(",", " with"))
    lines = ["| logits | answers | model types |", "|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {', '.join(names)} |" for key, names in sorted(rows.items())]
    return "\n".join([f"With transformers {version()}, from models of two layers:", "", *lines])


def written() -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    before, rest = PAGE.read_text().split(_BEGIN + "\n")
    inside, after = rest.split("\n" + _END)
    return before, inside, after


def main() -> None:
    from fedcmp.pipeline.world import models

    tokenizer = models.tokenizer()
    found: dict[str, Ways | str] = {}
    with tempfile.TemporaryDirectory() as root:
        for name in known():
            loaded = load(name, Path(root) / name, tokenizer)
            found[name] = loaded if isinstance(loaded, str) else loaded.ways
    text = table(found)
    print(text)
    if "--write" in sys.argv:
        before, _, after = written()
        PAGE.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


if __name__ == "__main__":
    main()
