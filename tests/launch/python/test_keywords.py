"""Settings from keywords are those of a job file."""

from pathlib import Path

import numpy as np
import pytest

import negpool
from launch.jobfile import read_job

TOML = """
[run]
folder = "runs/x"
[model]
name = "a"
lora_rank = 4
[optim]
lr = 0.001
[negatives]
schedule = [{checkpoint = 200, step = 400}]
[sources.one]
path = "d"
weight = 2.0
"""


def test_keywords_make_the_job_that_a_file_makes(tmp_path):
    (tmp_path / "job.toml").write_text(TOML)
    from_file = read_job(tmp_path / "job.toml", [])
    job = negpool.Job(
        model={"name": Path("a"), "lora_rank": np.int64(4)},
        run={"folder": Path("runs/x")},
        sources={"one": {"path": "d", "weight": 2.0}},
        negatives={"schedule": [{"checkpoint": 200, "step": 400}]},
        **{"optim.lr": np.float64(0.001)},
    )
    assert (job.train, job.mine, job.launch) == (from_file.train, from_file.mine, from_file.launch)
    (tmp_path / "again.toml").write_text(job.to_toml())
    assert negpool.Job.read(tmp_path / "again.toml") == job == negpool.Job(job=job) == negpool.Job.read(tmp_path / "job.toml")


def test_keywords_win_over_the_file_and_none_is_the_default(tmp_path):
    (tmp_path / "job.toml").write_text(TOML)
    job = negpool.Job.read(tmp_path / "job.toml", optim={"lr": None, "epochs": 2}, **{"run.seed": 7})
    assert (job.train.optim.lr, job.train.optim.epochs, job.train.run.seed) == (2e-5, 2, 7)
    assert negpool.Job(model="b", job=job, sources={"one": {"weight": 1.0}}).train.sources["one"].path == Path("d")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr": 3}, 'lr=3 is a setting without its section; write optim={"lr": 3}'),
        ({"per_query": 2}, 'write negatives={"per_query": 2}'),
        ({"optm": {}}, "optm is no section of a job; did you mean optim?"),
        ({"run": "runs/x"}, "run='runs/x' is no section; give its settings as a dictionary"),
        ({"optim": {"lrr": 1.0}}, "the arguments: unknown key optim.lrr; did you mean lr?"),
        ({"optm.lr": 1.0}, r"the arguments: unknown section \[optm\]; did you mean optim?"),
        ({"optim": {"lr": "high"}}, "optim.lr='high' cannot be used; expected number > 0"),
        ({"optim": {"lr": 1.0}, "optim.lr": 2.0}, "optim.lr is given twice"),
        ({"model": "a", "model.name": "b"}, "model.name is given twice"),
        ({"model": 7}, "model is a int; expected a name, a folder or a SentenceTransformer"),
        ({"data": 7}, "data is a int; expected a path, a name of the hub"),
        ({"job": 7}, "job is a int; expected a job file or a negpool.Job"),
        ({"job": "nosuch.toml"}, "there is no job file nosuch.toml"),
    ],
)
def test_what_is_no_setting_is_one_sentence(settings, sentence):
    with pytest.raises(negpool.InputError, match=sentence):
        negpool.Job(**settings)
