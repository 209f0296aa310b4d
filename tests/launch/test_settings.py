"""The list of settings is the code's own: each has its type, and each default can stand in a job file."""

import pytest

from launch.jobfile import read_job
from launch.settings import all_settings, settings_parts
from trainer.errors import InputError


def test_every_setting_of_a_resolved_job_is_listed():
    found = all_settings(None)
    resolved = read_job(None, []).resolved()
    assert found.keys() == resolved.keys()
    for section, values in resolved.items():
        listed = [setting["key"] for setting in found[section]["settings"]]
        assert values.keys() <= set(listed), section
    assert len(settings_parts(found)) == len(found)


def test_every_default_can_stand_in_a_job_file():
    words = []
    for section, about in all_settings(None).items():
        for setting in about["settings"]:
            if setting["default"] and section != "sources":
                words.append(f"{section}.{setting['key']}={setting['default']}")
    assert len(words) > 60
    assert read_job(None, words) == read_job(None, [])


def test_comments_above_and_behind_a_setting_are_found():
    (about,) = all_settings("filter").values()
    by_key = {setting["key"]: setting for setting in about["settings"]}
    assert about["about"] == "Judged positives, of any split, are always dropped."
    assert by_key["max_score"] == {
        "key": "max_score",
        "type": 'float | "off"',
        "default": '"off"',
        "meaning": "keep s < max_score (NV-Retriever's TopK-Abs, 0.7)",
    }
    assert by_key["when_empty"]["type"] == '"random" | "lowest" | "none"'
    assert by_key["when_empty"]["meaning"].startswith("what a query gets of which nothing passed: passages drawn from the whole")


def test_an_unknown_section_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="there is no section filters; did you mean filter"):
        all_settings("filters")
