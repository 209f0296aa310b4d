"""The list of settings is the code's own: each has its type, and each default can stand in a job file."""

import dataclasses
import re
import typing

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from launch.jobfile import LaunchJob, read_job
from launch.settings import NOT_SET, REQUIRED, all_settings, section_text, settings_text
from mining.job import MineJob
from trainer.errors import InputError
from trainer.job import TrainJob


def test_every_setting_of_a_resolved_job_is_listed():
    found = all_settings(None)
    resolved = read_job(None, []).resolved()
    assert found.keys() == resolved.keys()
    for section, values in resolved.items():
        listed = [setting["key"] for setting in found[section]["settings"]]
        assert values.keys() <= set(listed), section


def test_every_default_can_stand_in_a_job_file():
    words = []
    for section, about in all_settings(None).items():
        for setting in about["settings"]:
            if setting["default"] not in (NOT_SET, REQUIRED) and section != "sources":
                words.append(f"{section}.{setting['key']}={setting['default']}")
    assert len(words) > 60
    assert read_job(None, words) == read_job(None, [])


def test_every_setting_has_a_type_and_a_description():
    for section, about in all_settings(None).items():
        for setting in about["settings"]:
            assert setting["type"] and setting["meaning"].rstrip('.")…') and "\n" not in setting["meaning"], (section, setting)
    (about,) = all_settings("filter").values()
    by_key = {setting["key"]: setting for setting in about["settings"]}
    kept_out = "Judged positives, of any split, and documents with the query's own id are always dropped."
    assert about["about"] == f"which candidates may become negatives. {kept_out}"
    assert by_key["max_score"] == {
        "key": "max_score",
        "type": 'number | "off"',
        "default": '"off"',
        "meaning": "Keep s < max_score (NV-Retriever's TopK-Abs, 0.7).",
    }
    assert by_key["when_empty"]["type"] == '"random" | "lowest" | "none"'


def test_settings_are_readable_on_eighty_columns_in_words_of_toml():
    found = all_settings(None)
    shown = settings_text(found).plain
    assert max(map(len, shown.splitlines())) <= 80 and max(map(len, section_text().plain.splitlines())) <= 80
    assert not re.search(r"\b(None|True|False|dict)\b", shown)
    for name in found:
        title = "[sources.NAME]" if name == "sources" else f"[{name}]"
        after = shown.split(title + "\n")[1]
        assert after[0].isupper(), "a section begins with its sentence"
    for line in ('  mode = "mixed"', "  strict = false", "  columns = {}", "  cache (not set)", "  path (required)"):
        assert line in shown
    assert "not set: random batches" in " ".join(settings_text(all_settings("batch")).plain.split()).replace("Not", "not")


def beyond(hint):
    """Values next to a type's bounds that it must not take."""
    bounds = [bound for choice in (hint, *typing.get_args(hint)) for bound in getattr(choice, "__metadata__", ())]
    for bound in bounds:
        for part in bound if isinstance(bound, Interval) else [bound]:
            match part:
                case Gt(gt=value) | Lt(lt=value):
                    yield value
                case Ge(ge=value):
                    yield value - 1
                case Le(le=value):
                    yield value + 1


def test_what_lies_beyond_a_range_is_refused_by_name():
    num_refused = 0
    for job in (TrainJob, MineJob, LaunchJob):
        for section in dataclasses.fields(job):
            hints = typing.get_type_hints(section.type, include_extras=True) if section.name != "sources" else {}
            for key, hint in hints.items():
                for value in beyond(hint):
                    with pytest.raises(InputError, match=rf"^{section.name}\.{key}={value}(\.0)? cannot be used; expected"):
                        read_job(None, [f"{section.name}.{key}={value}"])
                    num_refused += 1
    assert num_refused > 60


def test_an_unknown_section_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="there is no section filters; did you mean filter"):
        all_settings("filters")
