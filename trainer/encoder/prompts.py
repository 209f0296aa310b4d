"""Prompts before texts: those that a folder records; warns where a known family wants some and none is set."""

import functools
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from trainer.encoder.settings import Traits
from trainer.encoder.source import read_json
from trainer.errors import InputError

log = logging.getLogger(__name__)

QUERY_NAMES, PASSAGE_NAMES = ("query",), ("document", "passage", "corpus")


class Family(NamedTuple):
    """Models whose queries, or whose texts of both sides, begin with something."""

    pattern: str  # of a name, in small letters
    query_prefix: str
    passage_prefix: str


REPRESENT = "Represent this sentence for searching relevant passages: "
INSTRUCT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
# The first whose pattern is in a name counts. Sources: the model cards.
FAMILIES = {
    "E5 with instructions": Family(r"e5-(mistral|large-instruct|.*instruct)", INSTRUCT, ""),
    "E5": Family(r"(^|[^a-z0-9])(multilingual-)?e5-(small|base|large)", "query: ", "passage: "),
    "BGE, Chinese": Family(r"bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", ""),  # noqa: RUF001
    "BGE": Family(r"bge-(small|base|large)(-en)?", REPRESENT, ""),
    "GTE with instructions": Family(r"gte-qwen|gte-.*instruct", INSTRUCT, ""),
    "Qwen3 Embedding": Family(r"qwen3-embedding", INSTRUCT.rstrip(" "), ""),
    "Mistral with instructions": Family(r"linq-embed-mistral|sfr-embedding|nv-embed|stella_en|kalm-embedding", INSTRUCT, ""),
    "nomic": Family(r"nomic-embed|modernbert-embed", "search_query: ", "search_document: "),
    "Arctic 2": Family(r"arctic-embed-[a-z]+-v2", "query: ", ""),
    "Arctic": Family(r"arctic-embed", REPRESENT, ""),
    "mxbai": Family(r"mxbai-embed", REPRESENT, ""),
    "UAE": Family(r"uae-large", REPRESENT, ""),
    "EmbeddingGemma": Family(r"embeddinggemma", "task: search result | query: ", "title: none | text: "),
}


def prefixes_of(config: dict[str, Any], file: str) -> dict[str, str]:
    """Return the prompts of queries and of passages that sentence-transformers' configuration names; raises InputError.

    A side that has none takes the default prompt, unless a prompt of either side is the default.
    """
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise InputError(f"{file} has prompts={prompts!r}, expected an object of prompts")
    if default is not None and default not in prompts:
        raise InputError(f"{file} has default_prompt_name={default!r}, expected one of its prompts {', '.join(prompts)}; mend it")
    query, passage = (next((prompts[n] for n in names if prompts.get(n)), "") for names in (QUERY_NAMES, PASSAGE_NAMES))
    if default is not None and default not in (*QUERY_NAMES, *PASSAGE_NAMES):
        # An empty prompt beside one that is not says that this side has none.
        has_own = bool(query or passage)
        query, passage = (
            text or ("" if has_own and any(name in prompts for name in names) else prompts[default] or "")
            for text, names in ((query, QUERY_NAMES), (passage, PASSAGE_NAMES))
        )
    return {"query_prefix": query, "passage_prefix": passage}


def warn_without_prompts(name: str, source: str, traits: Traits) -> None:
    """Warn where a model of a family that wants prompts is used without any, and its folder records none."""
    if traits.query_prefix or traits.passage_prefix or (Path(source) / "negpool.json").is_file():
        return
    found = family_of(name, source)
    if found is not None:
        _warn_once(name, found)


@functools.cache
def _warn_once(name: str, found: str) -> None:
    family = FAMILIES[found]
    log.warning(
        "%s is a model of the family %s, which wants prompts, and none is set: its figures will be lower than they could be; "
        "set model.query_prefix=%r and model.passage_prefix=%r, or as its card has them",
        name, found, family.query_prefix, family.passage_prefix,
    )  # fmt: skip


def family_of(name: str, source: str) -> str | None:
    """Return the family that a model's name, folder, configuration or card names, None for none of ours."""
    folder = Path(source).absolute()
    of_hub = [part for part in folder.parts if part.startswith("models--")]  # as the hub's cache calls its folders
    names = [name, folder.name, *of_hub, str(read_json(source, "config.json").get("_name_or_path", ""))]
    names += _named_by_card(folder / "README.md")
    for family, (pattern, _, _) in FAMILIES.items():
        if any(re.search(pattern, each.lower()) for each in names):
            return family
    return None


def _named_by_card(card: Path) -> list[str]:
    """Return the names in a model card: of the base, of its figures, of its first heading."""
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^(?:base_model:|- name:|\s*- )\s*(\S+)\s*$", text.split("\n---")[0], re.MULTILINE)
    return [*found, *re.findall(r"^# (.+)$", text, re.MULTILINE)[:1]]
