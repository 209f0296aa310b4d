"""The embedded data set: docstring -> function over Python code that is on this machine.

Query: the first paragraph of a docstring. Document: the function's source without its docstring. Functions that share a
docstring or a body fall into the same split, so nothing of test or dev occurs in training. Which functions are taken,
and their split, follow from hashes alone: the same packages give the same data set, in whatever order they are read.
Source: CodeSearchNet (Husain et al. 2019, arXiv 1909.09436) for the task and the rules of what to leave out.
"""

import ast
import hashlib
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.data.peers.beir import write_judgements, write_texts
from trainer.data.row import Entry
from trainer.errors import InputError
from trainer.handoff.beside import made_whole, refuse_full

log = logging.getLogger(__name__)

MIN_WORDS, MAX_WORDS = 3, 100  # of a query
MIN_LINES, MAX_LINES = 3, 200  # of a function without its docstring
TEST_SHARE, DEV_SHARE = 0.1, 0.03  # of all queries
MIN_TEST, MIN_DEV = 600, 100  # queries, as long as they are no more than a third of all
BLOCK = 128  # files read between two looks at whether there are enough functions
SKIPPED_FOLDERS = {"test", "tests", "testing", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class Function:
    """One documented function."""

    id: str  # file:line:qualified name
    query: str
    code: str


def build_code_search(
    out: Path, *, sources: Sequence[Path] | None = None, max_functions: int | None = None, seed: int = 0
) -> dict[str, int]:
    """Write the data set into the new folder `out`, whole or not at all, and return its counts.

    sources: folders of Python code; None: the packages installed beside this interpreter.
    max_functions: stop adding groups of functions at this many.
    Raises InputError if `out` holds something, a source is missing, or too few functions are found to split.
    """
    refuse_full(out)
    functions, counts = collect_functions(sources, max_functions, seed)
    groups = group_functions(functions)
    chosen = _choose_groups(groups, max_functions, seed)
    splits = _split_groups(chosen, seed)
    if not all(splits.values()):
        raise InputError(
            f"only {len(functions)} documented functions found, too few to split; give --source a folder with more code"
        )
    with made_whole(out) as folder:
        counts |= _write(folder, splits)
    return counts


def is_function_id(name: str) -> bool:
    """Tell whether an id is one of a function, as this module makes them."""
    return re.fullmatch(r".+\.py:\d+:[\w.]+", name) is not None


def collect_functions(
    sources: Sequence[Path] | None, max_functions: int | None, seed: int
) -> tuple[list[Function], dict[str, int]]:
    """Return documented functions, ordered by id, and counts of files read and not readable.

    max_functions: files are read in the order of their hashes until there are as many; whole files keep functions
        together that are easily confused, as in a real code base.
    """
    roots = [Path(s) for s in sources] if sources else _installed()
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root} is not a folder; expected a folder of Python code")
    files = {(str(root), str(path)) for root in roots for path in _python_files(root)}
    ordered = sorted(files, key=lambda file: _hash(seed, os.path.relpath(file[1], file[0])))
    enough = float("inf") if max_functions is None else max_functions
    found: list[Function] = []
    num_read = unreadable = 0
    with ProcessPoolExecutor() as pool:
        while num_read < len(ordered) and len(found) < enough:
            for part in pool.map(_functions_of, ordered[num_read : num_read + BLOCK], chunksize=16):
                unreadable += part is None
                found += part or []
            num_read += len(ordered[num_read : num_read + BLOCK])
    functions = sorted(found, key=lambda f: f.id)
    if not functions:
        raise InputError(f"no documented functions in {', '.join(map(str, roots))}; give --source a folder of Python code")
    return functions, {"files": num_read, "unreadable_files": unreadable}


def group_functions(functions: list[Function]) -> list[list[Function]]:
    """Return the functions in groups that share, directly or over others, a docstring or a body (normalised)."""
    parent = list(range(len(functions)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, function in enumerate(functions):
        for key in (("query", normalize_query(function.query)), ("code", normalize_code(function.code))):
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[Function]] = {}
    for i, function in enumerate(functions):
        groups.setdefault(root(i), []).append(function)
    return list(groups.values())


def normalize_query(text: str) -> str:
    """Return a docstring's words in lower case: what makes two docstrings the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def normalize_code(code: str) -> str:
    """Return code without its white space and its functions' names: what makes two functions the same."""
    return re.sub(r"\s+", "", re.sub(r"\bdef\s+\w+", "def", code))


def _installed() -> list[Path]:
    paths = sysconfig.get_paths()
    return sorted({Path(paths[key]) for key in ("purelib", "platlib", "stdlib")})


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # site-packages lies inside the standard library's folder, and is a root of its own
        subfolders[:] = [s for s in subfolders if s not in SKIPPED_FOLDERS | {"site-packages"} and not s.startswith(".")]
        yield from (Path(folder, n) for n in names if n.endswith(".py") and "test" not in n.lower())


def _functions_of(source: tuple[str, str]) -> list[Function] | None:
    """Return the documented functions of one file, None if it cannot be read."""
    root, path = source
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    lines = text.splitlines(keepends=True)
    found: list[Function] = []
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, prefix = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                stack.append((child, f"{prefix}{child.name}."))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _function(child, prefix, lines, os.path.relpath(path, root))
                found += [function] if function else []
    return found


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str, lines: list[str], file: str) -> Function | None:
    docstring = ast.get_docstring(node)
    name = node.name.lower()
    if not docstring or len(node.body) < 2 or "test" in name or (name.startswith("__") and name.endswith("__")):
        return None
    query = " ".join(docstring.strip().split("\n\n")[0].split())
    documented = node.body[0]
    assert documented.end_lineno is not None
    kept = lines[node.lineno - 1 : documented.lineno - 1] + lines[documented.end_lineno : node.end_lineno]
    # Functions with code before the docstring on its first line, or after it on its last, are not taken.
    indent = len(lines[node.lineno - 1]) - len(lines[node.lineno - 1].lstrip())
    code = "".join(line[indent:] if line[:indent].isspace() or indent == 0 else line for line in kept).strip("\n")
    num_lines = sum(bool(line.strip()) for line in kept)
    if not (MIN_LINES <= num_lines <= MAX_LINES and MIN_WORDS <= len(query.split()) <= MAX_WORDS and query.isascii()):
        return None
    return Function(f"{file}:{node.lineno}:{prefix}{node.name}", query, code)


def _hash(seed: int, *words: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join([str(seed), *words]).encode()).digest()[:8], "big")


def _choose_groups(groups: list[list[Function]], max_functions: int | None, seed: int) -> list[list[Function]]:
    """Return groups in the order of their hashes, as many as fit."""
    ordered = sorted(groups, key=lambda group: _hash(seed, group[0].query, group[0].id))
    if max_functions is None:
        return ordered
    chosen, num_functions = [], 0
    for group in ordered:
        if num_functions + len(group) <= max_functions:
            chosen.append(group)
            num_functions += len(group)
    return chosen


def _split_groups(groups: list[list[Function]], seed: int) -> dict[str, list[list[Function]]]:
    """Return test, dev and train, whole groups in the order of another hash, until each has its number of queries."""
    num_queries = [len({f.query for f in group}) for group in groups]
    total = sum(num_queries)
    wanted = {
        "test": max(TEST_SHARE * total, min(MIN_TEST, total / 3)),
        "dev": max(DEV_SHARE * total, min(MIN_DEV, total / 12)),
        "train": float("inf"),
    }
    splits: dict[str, list[list[Function]]] = {name: [] for name in wanted}
    filled = Counter[str]()
    order = sorted(range(len(groups)), key=lambda i: _hash(seed, "split", groups[i][0].query, groups[i][0].id))
    for i in order:
        name = next(name for name in wanted if filled[name] < wanted[name])
        splits[name].append(groups[i])
        filled[name] += num_queries[i]
    return splits


def _write(folder: Path, splits: dict[str, list[list[Function]]]) -> dict[str, int]:
    """Write BEIR's files: one query for each distinct docstring, one document for each function."""
    (folder / "qrels").mkdir(parents=True)
    queries: dict[str, Entry] = {}
    corpus: list[Entry] = []
    counts: dict[str, int] = {}
    for split, groups in splits.items():
        functions, num_before = sorted((f for group in groups for f in group), key=lambda f: f.id), len(queries)
        for function in functions:
            queries.setdefault(function.query, Entry(f"q{len(queries)}", function.query))
            corpus.append(Entry(function.id, function.code))
        counts[f"{split}_queries"] = len(queries) - num_before
        counts["functions"] = counts.get("functions", 0) + len(functions)
        write_judgements(folder / "qrels" / f"{split}.tsv", ((queries[f.query].id, f.id, 1) for f in functions))
    write_texts(folder / "corpus.jsonl", corpus)
    write_texts(folder / "queries.jsonl", queries.values())
    return counts
