"""What `negpool data prepare` makes is all that training, evaluating and mining read: none of them makes a table."""

import json

import pytest

from launch.ahead import describe, make_tables
from launch.jobfile import read_job
from mining.find.embeddings import TokenCache
from tests.system.test_commands import JOB, call
from tests.tiny import write_tiny_dataset, write_tiny_encoder
from tests.trainer.data.test_forms import pairs, write_lines
from tests.trainer.encoder.families import write_family
from tests.trainer.worlds import world_of
from trainer.data.cache import tables_asked_for
from trainer.data.datasets import open_data
from trainer.encoder import model as model_module
from trainer.encoder.model import ModelSettings, load_encoder, load_text_rules
from trainer.encoder.tokenizer import tokenizer_content
from trainer.errors import InputError
from trainer.handoff.weights import newest_checkpoint
from trainer.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    write_tiny_dataset(folder / "data")
    write_lines(folder / "more.jsonl", [pairs(number) for number in range(4)])
    write_tiny_encoder(folder / "encoder")
    (folder / "job.toml").write_text(JOB.format(root=folder))
    return folder


SOURCES = ["model.query_prefix=ask: ", "batch.mode=homogeneous", "sources.b.passage_prefix=read ", "sources.b.batch=2"]


@pytest.mark.parametrize("changes", [[], SOURCES], ids=["one", "several"])
def test_a_run_makes_no_table_after_prepare(root, tmp_path, changes):
    overrides = [f"run.folder={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}", "eval.every_steps=2", *changes]
    if changes:
        overrides += [f"sources.a.path={root / 'data'}", f"sources.b.path={root / 'more.jsonl'}"]
    jobs = read_job(root / "job.toml", overrides)
    first = make_tables(jobs)
    # Of texts: both sources and what they make; of tokens two; and keys of passages, before which the sources have prefixes.
    num_tables = 6 if changes else 3
    assert [table["made"] for table in first["tables"]] == [True] * num_tables == [True] * first["num_made"]
    assert all(table["bytes"] > 0 for table in first["tables"])
    again = make_tables(jobs, verify=True)
    assert again["num_made"] == 0 and len(again["tables"]) == num_tables
    with tables_asked_for() as asked:
        train(jobs.train, world_of())
        data = open_data(jobs.mine.data, jobs.mine.sources)
        TokenCache(data, data.training_queries()).open(newest_checkpoint(tmp_path / "run"))
    assert len(asked) >= 2 * num_tables and not any(table.made for table in asked)
    assert {str(table.folder) for table in asked} == {table["folder"] for table in first["tables"]}


def test_the_command_says_what_was_made_where_and_how_large(root, tmp_path):
    jobs = read_job(root / "job.toml", [f"data.cache={tmp_path}"])
    lines = describe(make_tables(jobs)).splitlines()
    assert [line.split()[0] for line in lines] == ["made"] * 3 + ["3"]
    assert f"tokens of the corpus of {root / 'data'}: {tmp_path}/tokens-" in lines[2] and " MiB " in lines[2]
    words = call(root, "data", "prepare", root / "job.toml", f"data.cache={tmp_path}", "--verify", "--json")[0]
    found = json.loads(words)
    assert found["num_made"] == 0 and [table["made"] for table in found["tables"]] == [False] * 3
    assert all(table["bytes"] > 100 for table in found["tables"]) and found["cache"] == str(tmp_path)


def test_a_table_that_has_changed_in_place_is_named(root, tmp_path):
    jobs = read_job(root / "job.toml", [f"data.cache={tmp_path}"])
    folder = make_tables(jobs)["tables"][-1]["folder"]
    file = tmp_path / folder / "lengths.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert make_tables(jobs)["num_made"] == 0
    with pytest.raises(InputError, match=r"lengths\.npy is not what its manifest says.*delete .*tokens-"):
        make_tables(jobs, verify=True)


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen2", "llama"])
@pytest.mark.parametrize("changes", [{}, {"attention": "bidirectional"}, {"max_query_tokens": 9, "pooling": "last"}], ids=str)
def test_the_rules_of_texts_are_those_of_the_model_and_no_weight_is_read(tmp_path, monkeypatch, family, changes):
    settings = ModelSettings(name=str(write_family(tmp_path / family, family)), **changes)
    _, tokenizer, traits = load_encoder(settings)
    monkeypatch.setattr(model_module, "load_backbone", lambda *_: pytest.fail("weights were read"))
    (tmp_path / family / "model.safetensors").unlink()
    found, found_traits = load_text_rules(settings)
    assert found_traits == traits and tokenizer_content(found) == tokenizer_content(tokenizer)
