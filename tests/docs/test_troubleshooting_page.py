"""The sentences that docs/troubleshooting.md quotes are those that the code prints."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
VALUE = "\0"  # where a sentence has something of the moment


def sentences():
    """Return every string of our modules, with VALUE for what is filled in."""
    found = []
    for path in [p for side in ("gradcache", "trainer", "mining", "launch") for p in (ROOT / side).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
                found.append("".join(map(str, parts)))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.0-9]*[sdgrf]", VALUE, node.value))
    return found


def test_every_quoted_sentence_is_printed_by_the_code():
    quoted = [line for fence in re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.M | re.S) for line in fence.splitlines()]
    ours = sentences()
    assert len(quoted) >= 25
    missing = []
    for line in quoted:
        parts = [part.strip(" ;,") for part in line.split("…")]
        wanted = ".*".join(re.escape(part) for part in parts if part)
        if not any(re.search(wanted, sentence, flags=re.S) for sentence in ours):
            missing.append(line)
    assert missing == []
