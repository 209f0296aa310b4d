"""What the columns of a record mean: read by the names that they have, or by those that data.columns gives them.

A role is the meaning of a column: the query, its positives, its negatives, … data.columns maps our name of a role to a column
of the file, or to "" where the file has none; no other column is then read in that role. Columns that are not read are
reported; one whose name looks like a role is refused unless data.columns says what it is.
"""

import itertools
import json
import re
import shlex
from collections.abc import Mapping
from difflib import get_close_matches
from typing import NamedTuple

from trainer.data.example import Bad
from trainer.data.peers.pairs import NUMBERED
from trainer.data.problems import near_names

# Our names of each role, in data.columns as in files; a form calls them by names of its own below.
ROLES = {
    "query": ("query", "anchor"),
    "positive": ("positive", "positives", "pos", "positive_passages"),
    "negative": ("negative", "negatives", "neg", "negative_passages"),  # and negative_1, negative_2 …
    "label": ("label", "labels", "score"),
    "scores": ("scores",),
    "pos_scores": ("pos_scores",),
    "neg_scores": ("neg_scores",),
    "prompt": ("prompt", "query_prompt", "query_instruction"),
    "type": ("type",),
    "title": ("title",),  # of the positive
    "query_id": ("query_id", "id"),
    "pos_id": ("pos_id",),
    "neg_id": ("neg_id",),
}
# The names of a role in each form, read without data.columns; the first is the one that its parser knows.
FORM_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "pairs": {
        "query": ("anchor", "query", "question", "sentence1", "text1"),
        "positive": ("positive", "positives"),
        "negative": ("negative", "negatives"),
        "label": ("label", "labels", "score"),
        "scores": ("scores",),
        "prompt": ROLES["prompt"],
        "title": ("title",),
        "query_id": ("query_id",),
    },
    "tevatron": {
        "query": ("query",),
        "positive": ("positive_passages",),
        "negative": ("negative_passages",),
        "prompt": ROLES["prompt"],
        "query_id": ("query_id",),
    },
    "flagembedding": {
        "query": ("query",),
        "positive": ("pos",),
        "negative": ("neg",),
        "label": ("label", "labels", "score"),
        "pos_scores": ("pos_scores",),
        "neg_scores": ("neg_scores",),
        "prompt": ROLES["prompt"],
        "type": ("type",),
        "query_id": ("id", "query_id"),
        "pos_id": ("pos_id",),
        "neg_id": ("neg_id",),
    },
}
# Passages that stand beside a query without being called positives, and the names of two equals.
BESIDE = ("answer", "answers", "passage", "passages", "document", "documents", "doc", "docs", "context", "text")
MANY = ("passages", "documents", "docs")  # as a list they are candidates, which need labels
EQUALS = {"sentence1": "sentence2", "text1": "text2"}
# What a column looks like, by a word of its name.
LOOKS = {
    "label": "label labels score scores relevance relevant rel grade grades similarity duplicate selected",
    "negative": "neg negs negative negatives hardneg hardnegs hardnegative hardnegatives distractor distractors rejected",
    "positive": "pos positive positives",
    "prompt": "prompt prompts instruction instructions instruct prefix",
}
LONGEST_NAME = 40  # of a column; longer ones are texts of a first line
GRADING = {"label", "scores", "pos_scores", "neg_scores"}
ID_WORDS = {"id", "ids", "idx", "docid", "docids", "pid", "pids"}


class Columns(NamedTuple):
    """How records with certain columns are read."""

    form: str
    names: dict[str, str]  # the file's columns that are read -> as the parser of the form knows them
    unread: tuple[str, ...]


def role_of(name: str) -> str | None:
    """Return the role that one of our names has, None if it is none."""
    return "negative" if NUMBERED.match(name) else next((role for role, names in ROLES.items() if name in names), None)


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Raise Bad if data.columns cannot be meant for records."""
    for name in mapping:
        if role_of(name) is None:
            known = ", ".join(names[0] for names in ROLES.values())
            near = get_close_matches(name, [each for names in ROLES.values() for each in names], n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise Bad("unknown columns", f"data.columns names {name!r}, which is none of {known}, negative_1, …{meant}")
    roles = [role_of(name) for name in mapping]
    for role in dict.fromkeys(roles):
        if role != "negative" and roles.count(role) > 1:
            names = " and ".join(name for name in mapping if role_of(name) == role)
            raise Bad("unknown columns", f"data.columns names the {role} twice, as {names}; leave one of them out")
    files = [column for column in mapping.values() if column]
    if twice := next((column for column in files if files.count(column) > 1), None):
        names = " and ".join(name for name, column in mapping.items() if column == twice)
        raise Bad("unknown columns", f"data.columns reads the column {twice!r} as {names}; give it one of these names alone")


def find_columns(found: tuple[str, ...], mapping: Mapping[str, str]) -> Columns:
    """Return how records with these columns are read; raises Bad with what is missing, ambiguous or looks like a role.

    mapping: as data.columns.
    """
    return _Reading(found, mapping).columns()


class _Reading:
    """The columns of a record, with the roles that are found for them."""

    def __init__(self, found: tuple[str, ...], mapping: Mapping[str, str]):
        self.found, self.mapping = found, mapping
        self.said = {role_of(name) for name in mapping}
        self.ours = {column: name for name, column in mapping.items() if column in found}
        self.free = [column for column in found if column not in self.ours]
        self.roles: dict[str, str] = {}  # by column, of those that are read

    def columns(self) -> Columns:
        form = self._form()
        for role, own in FORM_NAMES[form].items():
            said = [column for column, name in self.ours.items() if role_of(name) == role]
            chosen = said if role in self.said else self._natural(role, form)
            if not chosen and role in ("query", "positive"):
                self._refuse_missing(role, own[0])
            self.roles |= dict.fromkeys(chosen, role)
        names: dict[str, str] = {}
        for column, role in self.roles.items():
            name = self._parsers_name(role, column, FORM_NAMES[form][role])
            if name in names.values():
                other = next(each for each in names if names[each] == name)
                raise _ambiguous(role, [other, column])
            names[column] = name
        for column, name in self.ours.items():
            if column not in names:
                raise Bad("unknown columns", f"data.columns reads {column!r} as {name}, which the form {form} does not have")
        unread = tuple(column for column in self.found if column not in names)
        for column in unread:
            self._refuse_alike(column)
        return Columns(form, names, unread)

    def _form(self) -> str:
        said = [name for column, ours in self.ours.items() if role_of(ours) == "positive" for name in (ours, column)]
        names = said if "positive" in self.said else self.free
        return "tevatron" if "positive_passages" in names else "flagembedding" if "pos" in names else "pairs"

    def _natural(self, role: str, form: str) -> list[str]:
        """Return the columns that have a role by their own names; raises Bad if several might."""
        chosen = [column for column in self.free if column in FORM_NAMES[form][role]]
        if role == "negative":
            return chosen + [column for column in self.free if form == "pairs" and NUMBERED.match(column)]
        if role == "positive" and form == "pairs" and not chosen:
            other = EQUALS.get(next(iter(self.roles)))
            chosen = [other] if other in self.free else [column for column in self.free if column in BESIDE]
        if role == "query":
            chosen = [column for column in chosen if EQUALS.get(column, column) in self.found]
        if role == "title" and self.roles.get("text") != "positive":
            return []  # of the query, perhaps
        if role == "query_id" and len(chosen) > 1:
            chosen.remove("id")  # of the record
        if len(chosen) > 1:
            raise _ambiguous(role, chosen)
        return chosen

    def _parsers_name(self, role: str, column: str, own: tuple[str, ...]) -> str:
        """Return what a form's parser calls a column."""
        if role == "negative":
            name = self.ours.get(column, column)
            return name if name in own or (NUMBERED.match(name) and "negatives" in own) else own[0]
        if role == "positive" and column in MANY and column not in self.ours:
            return "candidates"
        if role != "label":
            return own[0]
        beside = next(each for each, is_role in self.roles.items() if is_role == "positive")
        is_called_positive = beside in self.ours or beside in ROLES["positive"]
        may_be_margin = "negative" in self.roles.values()  # a teacher's, of the positive over the negative
        # What was said, and a score of what is called a positive, may be any number.
        if column in self.ours or (column == "score" and is_called_positive and not may_be_margin):
            return "score"
        return "same" if beside in EQUALS.values() and beside not in self.ours else "label"

    def _refuse_missing(self, role: str, name: str) -> None:
        columns = ", ".join(f"{column:.40}" for column in self.found[:20]) + (", …" if len(self.found) > 20 else "")
        for ours, column in self.mapping.items():
            if role_of(ours) == role:
                sentence = f"data.columns = {{{ours} = {json.dumps(column)}}} names a column that is not there"
                raise Bad("unknown columns", f"{sentence}{near_names(column, self.found)}; found the columns {columns}")
        near = near_names(name, set(self.found) - {*self.roles})
        chosen = self._might_be(role)
        short = ",".join(f"{ours}={column}" for ours, column in chosen.items())
        table = ", ".join(f"{ours} = {json.dumps(column, ensure_ascii=False)}" for ours, column in chosen.items())
        how = f"--columns {shlex.quote(short)}, or data.columns = {{{table}}}"
        raise Bad(
            "unknown columns",
            f"found the columns {columns}; {name} is missing{near}; say which is which, as in {how}; docs/data.md has more",
        )

    def _might_be(self, role: str) -> dict[str, str]:
        """Return an example of data.columns for what is missing, of columns that are there."""
        roles = [role] if role == "positive" or {*self.found} & {*ROLES["positive"]} else ["query", "positive"]
        if any(len(column) > LONGEST_NAME for column in self.found):  # a file without names of columns
            return dict(zip(roles, map(str, range(2)), strict=False))
        free = [column for column in self.free if column not in self.roles and role_of(column) in (None, "title", "query")]
        return {ours: column for ours, column in itertools.zip_longest(roles, free[: len(roles)], fillvalue="…")}

    def _refuse_alike(self, column: str) -> None:
        """Raise Bad if a column that is not read looks like a role that data.columns says nothing about."""
        role = self._looks_like(column)
        if role is None or role in self.said or (role == "label" and GRADING & self.said):
            return
        is_id = re.split("[_-]", column.lower())[-1] in ID_WORDS
        if is_id and (role in self.roles.values() or role != "negative"):
            return
        now = next((each for each, is_role in self.roles.items() if is_role == role), "")
        teachers = "; a teacher's are scores, or pos_scores and neg_scores" if role == "label" else ""
        raise Bad(
            "unknown columns",
            f"found the column {column}, which is not read and looks like a {role}: set data.columns = "
            f'{{{role} = "{column}"}} to read it, or {{{role} = "{now}"}} to leave it out{teachers}',
        )

    def _looks_like(self, column: str) -> str | None:
        words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1_\2", column).lower())
        for role, known in LOOKS.items():
            if {*words} & {*known.split()}:
                return role
        for read, role in self.roles.items():
            # text3 beside text1 and text2
            if role in ("query", "positive") and re.fullmatch(rf"{re.escape(read.rstrip('0123456789'))}s?[_-]?\d*", column):
                return role
        near = get_close_matches(column, [name for role in (*LOOKS, "scores") for name in ROLES[role]], n=1, cutoff=0.8)
        return role_of(near[0]) if near else None


def _ambiguous(role: str, columns: list[str]) -> Bad:
    return Bad(
        "unknown columns",
        f'found {" and ".join(columns)}, and each may be the {role}: say which by data.columns = {{{role} = "{columns[0]}"}}',
    )
