"""The commands of docs/data.md train on records as people have them."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.jobfile import read_job
from tests.tiny import FILLER, TOPICS, write_tiny_encoder
from tests.trainer.data.test_forms import write_lines
from tests.trainer.worlds import world_of
from trainer.train import train

DOCS = Path(__file__).parent.parent.parent / "docs" / "data.md"
ROWS = [(f"{a} {b}", f"{a} the {b} {w}", f"{w} of {b}") for a, b, w in zip(TOPICS, TOPICS[1:], FILLER, strict=False)]
JOB = """
run = {trackers = []}
batch = {queries = 4}
optim = {steps = 5}
negatives = {per_query = 1, first_wait_s = 0.0}
"""


def write_triples(path):
    path.write_text("".join("\t".join(row) + "\n" for row in ROWS))


def write_lists(path):
    columns = [list(column) for column in zip(*ROWS, strict=True)]
    pq.write_table(
        pa.table({"question": columns[0], "answers": [[p] for p in columns[1]], "hard_negatives": [columns[2]] * len(ROWS)}), path
    )


def write_pairs(path):
    pd.DataFrame([row[:2] for row in ROWS], columns=["title", "abstract"]).to_csv(path, index=False)


def write_answers(path):
    write_lines(path, [{"question": row[0], "answer": row[1]} for row in ROWS])


WRITERS = {
    "triples.train.small.tsv": write_triples,
    "lists.parquet": write_lists,
    "pairs.csv": write_pairs,
    "qa.jsonl": write_answers,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_command_of_the_guide_trains_five_steps(tmp_path, monkeypatch, encoder, name):
    (command,) = re.findall(rf"^negpool train JOB\.toml (data\.path={re.escape(name)}.*)$", DOCS.read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    WRITERS[name](tmp_path / name)
    (tmp_path / "JOB.toml").write_text(JOB)
    own = [f"run.folder={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}", f"model.name={encoder}"]
    outcome = train(read_job(tmp_path / "JOB.toml", [*shlex.split(command), *own]).train, world_of())
    assert outcome.step == 5 and outcome.finished
