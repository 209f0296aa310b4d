"""The job file that `negpool init` writes: it validates, trains as it is, and gives a reason on every line."""

import json
import re
import tomllib
from dataclasses import replace

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from launch import init as module
from launch.commands import app
from launch.foreseen_warnings import warnings_of_job
from launch.init import batch_of, choose, interval_of, measure
from launch.jobfile import read_job
from launch.settings import all_settings
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.worlds import world_of
from trainer.data.datasets import open_data
from trainer.errors import InputError
from trainer.handoff.settings import DataSettings
from trainer.train import train


@pytest.fixture
def root(tmp_path, monkeypatch):
    write_tiny_dataset(tmp_path / "my data")
    write_tiny_encoder(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*words):
    done = CliRunner().invoke(app, ["init", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_file_trains_as_it_is_and_says_why_on_every_line(root):
    said = init("my data", "--model", "encoder", f"data.cache={root}/cache")
    text = (root / "my data.toml").read_text()
    assert said.split("\n") == [
        "Written to my data.toml. Next:", "  negpool run 'my data.toml' --dry-run", "  negpool run 'my data.toml'", ""
    ]  # fmt: skip
    settings = [line for line in text.splitlines() if re.match(r"\w+ = ", line)]
    assert all(re.search(r" # \w", line) for line in settings) and 15 <= len(settings) + text.count("[") <= 40
    assert "change next" in text and max(map(len, text.splitlines())) <= 120
    jobs = read_job(root / "my data.toml", [])
    assert jobs.train.data.cache == root / "cache", "what was given is kept"
    outcome = train(read_job(root / "my data.toml", ["optim.steps=3", "negatives.first_wait_s=0"]).train, world_of())
    assert outcome.finished and outcome.step == 3 and {"untrained", "trained"} <= outcome.evaluations.keys()


def test_lengths_are_those_of_the_tokenizer(root):
    data = open_data(DataSettings(path=root / "my data", cache=root / "cache"), {})
    found = measure(DataSettings(path=root / "my data"), str(root / "encoder"), data)
    tokenizer = AutoTokenizer.from_pretrained(root / "encoder")
    texts = [json.loads(line)["text"] for line in (root / "my data" / "corpus.jsonl").read_text().splitlines()]
    lengths = sorted(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert abs(found.passage_lengths[0] - lengths[len(lengths) // 2]) <= 1
    below = sum(length <= found.passage_lengths[1] for length in lengths) / len(lengths)
    assert below >= 0.95 and found.num_queries == 36 and found.num_parameters > 1000


def test_a_file_that_is_there_stays(root):
    (root / "job.toml").write_text("mine")
    with pytest.raises(InputError, match=r"job\.toml is there already, and is not written over; name another file with --out"):
        init("my data", "--model", "encoder", "--out", "job.toml")
    assert (root / "job.toml").read_text() == "mine"


def test_columns_of_a_file_are_kept_in_the_job(root):
    rows = [{"question": f"how {i} sort", "reply": f"list {i} merge tree"} for i in range(60)]
    (root / "faq.v2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "runs" / "faq" / "checkpoints").mkdir(parents=True)
    (root / "runs" / "faq-2").mkdir()
    said = init("faq.v2.jsonl", "--model", "encoder", "--columns", "query=question,positive=reply", f"data.cache={root}/cache")
    table = tomllib.loads((root / "faq.toml").read_text())
    assert table["data"]["columns"] == {"query": "question", "positive": "reply"} and table["run"]["folder"] == "runs/faq-2", (
        "runs/faq holds a run already"
    )
    text = (root / "faq.toml").read_text()
    assert "nothing is evaluated: negpool data split DATA OUT" in text and max(map(len, text.splitlines())) <= 120
    command = "negpool data split faq.v2.jsonl data/faq --columns query=question,positive=reply"
    sentence = f"no test and no dev queries: nothing will tell whether the model is better; {command} sets some aside"
    assert said.splitlines()[3:] == [sentence]
    jobs = read_job(root / "faq.toml", [])
    data = open_data(jobs.train.data, {})
    assert warnings_of_job(jobs, data) == [sentence.replace("no test and no dev", "no test")]
    with pytest.raises(InputError, match=r"only train; choose one of these with --split train, or let negpool data split"):
        app(["eval", "bm25", "faq.v2.jsonl", "--columns", "query=question,positive=reply"], standalone_mode=False)


def test_a_model_that_is_not_here_is_told_by_words_and_a_wrong_name_is_refused(root):
    data = open_data(DataSettings(path=root / "my data", cache=root / "cache"), {})
    found = measure(DataSettings(path=root / "my data"), "no-such/model", data)
    assert found.num_parameters is None and found.query_lengths[0] == 8  # four words, 1.4 tokens each, two at the ends
    with pytest.raises(InputError, match="is not a model that can be loaded"):
        measure(DataSettings(path=root / "my data"), "no such/model!", data)


def test_choices_follow_the_data_and_the_machine(root, monkeypatch):
    data = open_data(DataSettings(path=root / "my data", cache=root / "cache"), {})
    found = measure(DataSettings(path=root / "my data"), str(root / "encoder"), data)
    known = {f"{section}.{s['key']}" for section, about in all_settings(None).items() for s in about["settings"]}
    large = replace(found, num_queries=500_000, num_passages=8_000_000, most_tokens=(512, 512), passage_lengths=(90, 700))
    for each, gpus in ((found, 0), (large, 0), (large, 8)):
        chosen = {f"{line.section}.{line.key}": line.value for line in choose(replace(each, num_gpus=gpus))}
        assert chosen.keys() <= known
        assert chosen["batch.queries"] <= each.num_queries and chosen["search.top_k"] <= each.num_passages // 10
        assert chosen["sample.num_negatives"] <= chosen["search.top_k"]
        if each is large:
            assert chosen["model.max_passage_tokens"] == (512 if gpus else 128) and chosen["search.top_k"] == 200
            assert ("launch.train_ranks" not in chosen) == (gpus > 0)
    assert [batch_of(n, 2, False) for n in (3, 400, 5000, 10**6)] == [3, 16, 64, 64] and batch_of(10**6, 2, True) == 1024
    assert interval_of(60, 1) == 10 and interval_of(60, 25) == 25 and interval_of(60, 500) == 30 and interval_of(3, 9) == 2
    assert module.SAMPLED <= 2000
