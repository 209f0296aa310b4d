"""The files of a collection in a folder, by their names: which hold the corpus, the queries, the judgements of each split.

BEIR's names, MS MARCO's, those of the hub's folders, and the like. If a name says only the split, the file's content decides.
Files that are not read are reported.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.cells import SUFFIXES as TABLES_OF_TEXT
from trainer.data.cells import read_cells
from trainer.data.example import Bad
from trainer.data.files import read_records
from trainer.data.headings import Headings
from trainer.data.problems import PACKED, Problem
from trainer.data.qrel_files import is_judged, listed_ids
from trainer.data.saved import is_saved, saved_files
from trainer.data.text_files import is_table_of_text
from trainer.errors import InputError

SPLIT_NAMES = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
RECORDS = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow")
ROLES = {  # by words of a name; the first that fits
    "qrels": re.compile(r"\d*(qrels?|judge?ments?)"),
    "triples": re.compile(r"\w*triples?"),
    "queries": re.compile(r"quer(y|ies)|topics?|questions?"),
    "corpus": re.compile(r"corpus|collection|(full)?docs?|documents?|passages?|psgs"),
}
SPLIT = re.compile(rf"(?:doc|passage)?({'|'.join(SPLIT_NAMES)})\d*")
PART = re.compile(r"[-_.]\d{5}[-_]of[-_]\d{5}")
NUMBER = re.compile(r"0+\d*")  # of a part, as the hub's own Parquet files have it
NEUTRAL = ("data", "default", "msmarco", "beir")  # words and folders that say nothing
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


class Candidate(NamedTuple):
    """Files of one name: one, or the parts of a saved table."""

    folder: str
    name: str
    files: list[Path]

    @property
    def words(self) -> list[str]:
        return [*_words(self.folder), *_words(self.name)]


class Layout(NamedTuple):
    """The files of a collection: corpus, queries, qrels-SPLIT, triples-SPLIT, records-SPLIT; and those that are not read."""

    files: dict[str, list[Path]]
    unread: list[Path]


def find_layout(path: Path, columns: Mapping[str, str], entries: list[Candidate] | None = None) -> Layout | None:
    """Return the files of the collection in a folder; None if there is none. Raises InputError if a part of it is missing.

    columns: as data.columns. entries: what there is, if that is no folder.
    """
    headings = Headings(columns, _ignore)
    found: dict[str, list[Candidate]] = {role: [] for role in ("corpus", "queries", "qrels", "triples", "listed", "records")}
    unread = []
    named = [(entry, role_of(entry.folder) or role_of(entry.name)) for entry in entries or _entries(path) if entry.files]
    has_corpus = any(role == "corpus" and not entry.files[0].name.endswith(".txt") for entry, role in named)
    for entry, role in named:
        if role in ("corpus", "queries") and entry.files[0].name.endswith(".txt"):
            continue  # a note, or what has no columns
        if has_corpus and role in (None, "triples"):
            role = _role_by_content(entry, role, headings)
        if role:
            found[role].append(entry)
        elif not entry.files[0].name.endswith(".txt"):
            unread += entry.files
    for side in ("corpus", "queries"):
        found[side], others = _without_variants(found[side])
        unread += others
    asking = [entry for entry in found["listed"] if "text" in _columns_of(entry, "queries", headings)]  # bring their queries
    has_texts = {"corpus": has_corpus, "queries": bool(found["queries"] or found["records"] or asking)}
    has_judgements = any(found[role] for role in ("qrels", "triples", "listed", "records"))
    if not (all(has_texts.values()) and has_judgements):
        _refuse_part(path, has_texts, has_judgements, unread)
        return None
    files = {side: [file for entry in found[side] for file in entry.files] for side in ("corpus", "queries")}
    files["queries"] += [file for entry in asking for file in entry.files]
    for role in ("qrels", "listed", "triples", "records"):
        for split, entry in _by_split(found[role]):
            files.setdefault(f"{'qrels' if role == 'listed' else role}-{split}", []).extend(entry.files)
    return Layout(files, unread)


def _without_variants(entries: list[Candidate]) -> tuple[list[Candidate], list[Path]]:
    """Return the files of a side, and those that are passed over: corpus_old.jsonl beside corpus.jsonl."""
    has_plain = any(split_of(entry.name) is None and not _rest(entry) for entry in entries)
    is_kept = [not has_plain or split_of(entry.name) is not None or not _rest(entry) for entry in entries]
    kept = [entry for entry, keeps in zip(entries, is_kept, strict=True) if keeps]
    return kept, [file for entry, keeps in zip(entries, is_kept, strict=True) if not keeps for file in entry.files]


def role_of(name: str) -> str | None:
    """Return what a file or a folder of this name holds in a collection."""
    return next((role for role, word in ROLES.items() if any(word.fullmatch(w) for w in _words(name))), None)


def split_of(name: str) -> str | None:
    """Return the split that a name says."""
    match = next((match for word in _words(name) if (match := SPLIT.fullmatch(word))), None)
    return SPLIT_NAMES[match[1]] if match else None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", PART.sub("", name.lower())) if word]


def _entries(path: Path) -> list[Candidate]:
    """Return what may be data in a folder, and in those folders in it whose names say so."""
    if is_saved(path):
        return [Candidate("", split or "train", files) for split, files in saved_files(path).items()]
    folders = [child for child in sorted(path.iterdir()) if child.is_dir() and _says_something(child.name)]
    entries = list(_files_of(path.iterdir(), path))
    for folder in folders:
        if is_saved(folder):
            inside = [Candidate("", split or "", files) for split, files in saved_files(folder).items()]
        else:
            inside = list(_files_of(folder.rglob("*"), folder))
        entries += [entry._replace(folder=folder.name) for entry in inside]
    return entries


def _says_something(folder: str) -> bool:
    return bool(role_of(folder) or split_of(folder) or folder in NEUTRAL)


def _files_of(files: Iterable[Path], folder: Path) -> Iterator[Candidate]:
    """Yield the files that may be data, without packed ones that stand there unpacked, too."""
    for file in sorted(files):
        plain = file.with_suffix("") if file.suffix in PACKED else file
        is_twin = plain != file and plain.exists()
        name = str(plain.relative_to(folder))
        if is_twin or file.name in NOT_DATA or name.startswith((".", "README", "LICENSE")) or "/." in name:
            continue
        if plain.name.endswith((*RECORDS, *TABLES_OF_TEXT)) and file.is_file():
            yield Candidate("", re.sub(r"\.(jsonl?|ndjson|parquet|arrow|tsv|csv|txt|trec)$", "", name), [file])


def _role_by_content(entry: Candidate, role: str | None, headings: Headings) -> str | None:
    """Return what a file holds whose name does not say it; None if nothing that is read beside a collection."""
    file, split = entry.files[0], split_of(" ".join(entry.words))
    if is_table_of_text(file):
        cells = next(read_cells(file, _ignore), (0, []))[1]
        has_ids = len(cells) == 3 and not any(" " in cell for cell in cells)
        return "triples" if role and has_ids else "qrels" if split and not role and is_judged(cells, headings) else None
    if {"query-id", "corpus-id"} <= _columns_of(entry, "judged", headings).keys():
        return "qrels"
    record, listed = _first(file), _columns_of(entry, "listed", headings)
    if not split or _has_passages(record):
        return "records" if split else None
    has_lists = "query-id" in listed and listed_ids(record, listed, "positive_ids") is not None
    are_texts = listed.get("positive_ids") == "pos" and "query" in record  # FlagEmbedding's
    return "listed" if has_lists and not are_texts else None


def _has_passages(record: dict[str, Any]) -> bool:
    """Return whether a record brings the texts of its passages, as Tevatron's do."""
    passages = record.get("positive_passages")
    return bool(isinstance(passages, list) and passages and isinstance(passages[0], dict) and "text" in passages[0])


def _columns_of(entry: Candidate, kind: str, headings: Headings) -> dict[str, str]:
    """Return which columns of a file are ours; none where that is not clear."""
    try:
        return headings.find(_first(entry.files[0]), kind)
    except Bad:
        return {}


def _first(file: Path) -> dict[str, Any]:
    """Return the first record of a file; none: one without columns."""
    return next((record for _, record in read_records(file, _ignore)), {})


def _ignore(problem: Problem) -> None:
    """Ignore the problem here; the code that reads the file for its texts reports it."""


def _by_split(entries: list[Candidate]) -> Iterator[tuple[str, Candidate]]:
    """Yield each file with its split: the one that its name says, otherwise the rest of the name, train if there is none.

    Where several say the same one, as qrels.dev and qrels.dev.small, the rest of the name tells them apart.
    """
    said = [(split_of(" ".join(entry.words)), _rest(entry)) for entry in entries]
    for (split, rest), entry in zip(said, entries, strict=True):
        is_alone = len({other for known, other in said if known == split}) == 1
        yield split if split and (is_alone or not rest) else "-".join(filter(None, [split, rest])) or "train", entry


def _rest(entry: Candidate) -> str:
    """Return what the name of a file says beside its role and its split."""
    words = [re.sub(r"^(\d+)qrels?$", r"\1", word) for word in entry.words]
    known = [*ROLES.values(), SPLIT, NUMBER]
    return "-".join(word for word in words if word not in NEUTRAL and not any(each.fullmatch(word) for each in known))


def _refuse_part(path: Path, has_texts: dict[str, bool], has_judgements: bool, unread: list[Path]) -> None:
    """Raise InputError if what is there is a part of a collection, and no records."""
    is_bound_to_be_one = (path / "corpus.jsonl").exists() or (path / "queries.jsonl").exists() or (path / "qrels").is_dir()
    if not is_bound_to_be_one and sum([*has_texts.values(), has_judgements]) < 2:
        return
    other = f"; {unread[0]} is there, and its name does not say what it holds" if unread else ""
    for side, has_side in has_texts.items():
        if not has_side:
            needed = "a data set needs corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
            raise InputError(f"{path / side}.jsonl is missing; {needed}{other}")
    raise InputError(f"{path / 'qrels'} holds no judgements; a data set needs at least one qrels/SPLIT.tsv{other}")
