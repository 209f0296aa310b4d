"""Presets are settings of published systems: each reads as a job, the job's own values win, and --explain says from where."""

import json

import pytest

from launch.commands import app
from launch.explain import explain
from launch.jobfile import read_job, write_job
from launch.presets import PRESETS
from trainer.errors import InputError


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_job_whose_settings_are_those_it_names(name):
    jobs = read_job(None, [f"loss.preset={name}", "loss.same_side=true"] if name == "gte" else [f"loss.preset={name}"])
    resolved = jobs.resolved()
    for setting, value in PRESETS[name].settings.items():
        place = resolved
        for part in setting.split("."):
            place = place[part]
        assert place == value, setting
    assert not jobs.remarks and any(value != read_job(None, []).resolved().get(key) for key, value in resolved.items())


def test_the_jobs_own_value_wins_and_is_said():
    jobs = read_job(None, ["loss.preset=unime", "loss.temperature=0.05", "loss.parameters.hardest=8"])
    assert jobs.train.loss.temperature == 0.05 and jobs.train.loss.parameters == {"hardest": 8}
    assert jobs.remarks == ("loss.temperature is 0.05 here, and 0.02 in loss.preset=unime (UniME, Gu et al. 2025)",)
    found = explain(jobs)
    by_name = {row["name"]: (row["value"], row["from"]) for row in found["settings"]}
    assert by_name["loss.absolute_margin"] == (-0.1, "loss.preset=unime: UniME, Gu et al. 2025")
    assert by_name["loss.temperature"] == (0.05, "the job") and by_name["loss.parameters.hardest"] == (8, "the job")


def test_a_job_that_was_resolved_reads_as_the_same_job(tmp_path):
    jobs = read_job(None, ["loss.preset=embeddinggemma"])
    write_job(tmp_path / "job.toml", jobs)
    assert read_job(tmp_path / "job.toml", []) == jobs


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"there is no loss\.preset='rzen-embed'; did you mean 'rzenembed'\?"):
        read_job(None, ["loss.preset=rzen-embed"])


def test_explain_prints_settings_and_trains_nothing(tmp_path, monkeypatch, capfd):
    (tmp_path / "job.toml").write_text('[loss]\npreset = "gte"\ntemperature = 0.02\n')
    monkeypatch.chdir(tmp_path)
    assert app(["train", "job.toml", "--explain", "--json"], standalone_mode=False) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["preset"]["source"] == "GTE, Li et al. 2023" and found["remarks"]
    assert {"name": "loss.partition", "value": "joint", "from": "loss.preset=gte: GTE, Li et al. 2023"} in found["settings"]
    assert app(["train", "job.toml", "--explain"], standalone_mode=False) == 0
    shown = capfd.readouterr()
    assert "loss.partition" in shown.out and "loss.temperature is 0.02 here, and 0.01" in " ".join(shown.err.split())
    assert not (tmp_path / "runs").exists()
