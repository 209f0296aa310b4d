"""What a shell offers for `section.key=value`: the sections, the keys of a section, and the values that a key has names for."""

import re
from typing import Any

from launch.settings import all_settings

Offers = list[tuple[str, str]]  # a word, and what the shell says of it
WORDS = re.compile(r'"(\w[\w@.-]*)"|\b(true|false)\b')  # of a type, that can be typed as they are


def offers(incomplete: str, earlier: list[str], sections: tuple[str, ...] = ()) -> Offers:
    """Return what may follow; earlier: the words before, for bash takes `optim.schedule=li` for three of them."""
    found = {name: about for name, about in all_settings(None).items() if not sections or name in sections}
    if (key := _split_key(incomplete, earlier)) is not None:
        return _values(found, key, "")
    key, has_value, _ = incomplete.partition("=")
    if has_value:
        return _values(found, key, f"{key}=")
    if "." not in incomplete:
        return [(f"{name}.", about["about"]) for name, about in found.items() if name.startswith(incomplete)]
    section, dot, start = incomplete.rpartition(".")
    settings = found.get(section.split(".")[0], {"settings": []})["settings"]
    return [(f"{section}{dot}{s['key']}=", s["meaning"]) for s in settings if s["key"].startswith(start)]


def _split_key(incomplete: str, earlier: list[str]) -> str | None:
    """Return the key that stands before, where the shell has cut the words at the equals sign."""
    if len(earlier) > 1 and earlier[-1] == "=":
        return earlier[-2]
    return earlier[-1] if incomplete == "" and earlier and re.fullmatch(r"\w+(\.\w+)+", earlier[-1]) else None


def _values(found: dict[str, dict[str, Any]], key: str, before: str) -> Offers:
    section, _, name = key.rpartition(".")
    settings = found.get(section.split(".")[0], {"settings": []})["settings"]
    words = [word for s in settings if s["key"] == name for pair in WORDS.findall(s["type"]) for word in pair if word]
    return [(f"{before}{word}", "") for word in words]
