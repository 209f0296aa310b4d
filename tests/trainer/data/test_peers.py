"""What we write goes through the readers of the trainers that it is meant for, and through one step of their training.

sentence-transformers is installed. FlagEmbedding and Tevatron ask for other versions of what they stand on, so
`launch/install.sh` puts them, without that, into a folder of their own. Nothing of them is replaced but what they call in
libraries by its old name.
"""

import json
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BatchEncoding

from tests.tiny import TOPICS, write_tiny_encoder
from trainer.data.convert import convert_data
from trainer.data.datasets import open_dataset

PEERS = Path(sys.prefix) / "peers"
NUM_QUERIES, NUM_NEGATIVES = 12, 3
PROMPT = "for each "


def texts(number):
    """The query, the positives and the negatives of a record: all but two records have NUM_NEGATIVES."""
    words = [TOPICS[(number + place) % len(TOPICS)] for place in range(6)]
    count = {0: 0, 5: 1}.get(number, NUM_NEGATIVES)
    positives = [(words[0], f"{words[1]} with {TOPICS[number]}"), ("", f"{words[2]} and {TOPICS[number]}")]
    return f"{words[0]} {words[1]}", positives, [(words[3], f"{place} of {words[4]}") for place in ["one", "two", "all"][:count]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set with ids, titles and a teacher's scores, 1 / (1 + place) + number; and a tiny encoder."""
    root = tmp_path_factory.mktemp("peers")
    write_tiny_encoder(root / "encoder")
    with open(root / "train.jsonl", "w") as file:
        for number in range(NUM_QUERIES):
            query, *sides = texts(number)
            scores = iter(number + 1 / (1 + place) for place in range(9))
            record = {"query_id": f"q{number}", "query": query}
            for name, side in zip(("positive_passages", "negative_passages"), sides, strict=True):
                ids = [f"{title}/{text}/{number}" for title, text in side]
                record[name] = [
                    {"docid": row_id, "title": title, "text": text, "score": next(scores)}
                    for row_id, (title, text) in zip(ids, side, strict=True)
                ]
            file.write(json.dumps(record) + "\n")
    return root


@pytest.fixture(scope="module")
def data(root):
    return open_dataset(root / "train.jsonl", root / "cache")


@pytest.fixture(scope="module")
def written(data, root):
    """The file of each form, and what was said of it."""
    found = {}
    for form in ("sentence-transformers", "flagembedding", "tevatron"):
        path = root / form / "train.jsonl"
        found[form] = path, convert_data(data, path, form)
    return found


def wanted(number):
    """Score by text of a record, titles in front, positives first; None: it is left out."""
    query, positives, negatives = texts(number)
    found = [f"{title} {text}".strip() for title, text in [*positives, *negatives]]
    return query, found[:2], {text: np.float32(number + 1 / (1 + place)) for place, text in enumerate(found)}


def peer(name):
    """Make a peer's package importable, but for what it imports on the way to its parts."""
    folder = PEERS / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in {folder}; launch/install.sh .venv-test test brings it")
    package = types.ModuleType(name)
    package.__path__ = [str(folder / name)]  # what stands in its __init__.py needs its inference, and that needs more
    sys.modules.setdefault(name, package)


def changed(before, model):
    """Tell whether a step has moved every weight matrix of the encoder, to finite values."""
    after = {name: value for name, value in model.state_dict().items() if name in before}
    assert all(torch.isfinite(value).all() for value in after.values())
    return all(not torch.equal(before[name], after[name]) for name in before if name.endswith("query.weight"))


def weights(model):
    found = {name: value.clone() for name, value in model.state_dict().items()}
    assert any(name.endswith("query.weight") for name in found)
    return found


def test_sentence_transformers_trains_on_records_of_one_length(written, root):
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MultipleNegativesRankingLoss

    path, told = written["sentence-transformers"]
    table = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(root / "st-cache"))
    assert told["files"]["train"] == {"records": 20, "num_negatives": 3, "left_out": 4, "cut": 0}
    assert "train: 4 of 24 records have fewer than 3 negatives and are left out" in " ".join(told["said"])
    assert table.column_names == ["anchor", "positive", "negative_1", "negative_2", "negative_3", "scores"]
    for name, loss in (("ranking", MultipleNegativesRankingLoss), ("distilled", DistillKLDivLoss)):
        model = SentenceTransformer(str(root / "encoder"), device="cpu")
        how = dict(max_steps=1, per_device_train_batch_size=20, learning_rate=0.1, report_to=[], use_cpu=True, warmup_steps=0)
        args = SentenceTransformerTrainingArguments(output_dir=str(root / name), save_strategy="no", **how)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=table, loss=loss(model))
        (batch,) = trainer.get_train_dataloader()
        assert batch["label"].shape == (20, 1 + NUM_NEGATIVES), "its collator takes the teacher's scores for labels"
        expected = [record for number in range(NUM_QUERIES) if number not in (0, 5) for record in as_pairs(number)]
        assert sorted(batch["label"].tolist()) == sorted(expected)
        before = weights(model)
        trainer.train()
        assert changed(before, model), name


def as_pairs(number):
    """The scores of the two records of a query: of a positive and of all negatives."""
    scores = [float(score) for score in wanted(number)[2].values()]
    return [[scores[place], *scores[2:]] for place in range(2)]


def test_flagembedding_reads_prompts_scores_and_types_and_trains(root, tmp_path):
    peer("FlagEmbedding")
    from FlagEmbedding.finetune.embedder.encoder_only import base

    records = []
    for number in range(NUM_QUERIES):
        query, positives, scores = wanted(number)
        negatives = list(scores)[2:]
        record = {"query": query, "pos": positives, "neg": negatives, "type": "normal", "id": f"q{number}"}
        record |= {"pos_id": [f"p{text}" for text in positives], "neg_id": [f"n{text}" for text in negatives]}
        values = [float(score) for score in scores.values()]
        record |= {"pos_scores": values[:2], "neg_scores": values[2:], **({"prompt": PROMPT} if number % 2 else {})}
        records.append(record)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    told = convert_data(open_dataset(tmp_path / "train.jsonl", tmp_path / "cache"), tmp_path / "out.jsonl", "flagembedding")
    assert "1 of 12 records have no negatives and are left out" in " ".join(told["said"])
    options = {"train_data": [str(tmp_path / "out.jsonl")], "cache_path": str(tmp_path / "flag"), "train_group_size": 4}
    options |= {"knowledge_distillation": True, "query_instruction_for_retrieval": "of all others"}
    how = {"max_steps": 1, "per_device_train_batch_size": 11, "learning_rate": 0.1, "report_to": [], "use_cpu": True}
    runner = base.EncoderOnlyEmbedderRunner(
        base.EncoderOnlyEmbedderModelArguments(model_name_or_path=str(root / "encoder")),
        base.EncoderOnlyEmbedderDataArguments(**options),
        base.EncoderOnlyEmbedderTrainingArguments(output_dir=str(tmp_path / "run"), **how),
    )
    assert {"id", "pos_id", "neg_id", "type"} <= set(runner.train_dataset.dataset.column_names)
    for (query, passages, scores), number in zip(runner.train_dataset, range(1, NUM_QUERIES), strict=True):
        text, positives, known = wanted(number)
        assert query == (PROMPT if number % 2 else "") + text
        assert passages[0] in positives and len(passages) == 4 and not set(passages[1:]) & set(positives)
        assert scores == [known[passage] for passage in passages]
    before = weights(runner.model)
    runner.run()
    assert changed(before, runner.model)


def test_tevatron_reads_titles_and_trains(written, root, tmp_path):
    peer("tevatron")
    from tevatron.arguments import DataArguments, DenseTrainingArguments, ModelArguments
    from tevatron.data import QPCollator, TrainDataset
    from tevatron.datasets import HFTrainDataset
    from tevatron.modeling import DenseModel
    from tevatron.trainer import DenseTrainer

    path, told = written["tevatron"]
    assert "1 of 12 records have no negatives and are left out" in " ".join(told["said"])
    how = {"max_steps": 1, "per_device_train_batch_size": 11, "learning_rate": 0.1, "report_to": [], "use_cpu": True}
    train_args = DenseTrainingArguments(output_dir=str(tmp_path), save_strategy="no", warmup_ratio=0.0, **how)
    data_args = DataArguments(dataset_name=str(path.parent), train_n_passages=4, dataset_proc_num=None, p_max_len=16)
    tokenizer = AutoTokenizer.from_pretrained(root / "encoder")
    table = HFTrainDataset(tokenizer, data_args, str(root / "tevatron-cache")).process()
    for record, number in zip(table, range(1, NUM_QUERIES), strict=True):
        query, positives, scores = wanted(number)
        assert (record["query"], record["positives"]) == (ids_of(tokenizer, query), [ids_of(tokenizer, t) for t in positives])
        assert record["negatives"] == [ids_of(tokenizer, text) for text in scores][2:]

    class OfThisVersion(DenseTrainer):
        def compute_loss(self, model, inputs, **_):  # transformers has one more argument
            return super().compute_loss(model, inputs)

    def encode_plus(ids, max_length, **_):  # transformers has dropped it
        return BatchEncoding({"input_ids": [tokenizer.cls_token_id, *ids[: max_length - 2], tokenizer.sep_token_id]})

    tokenizer.encode_plus = encode_plus
    model = DenseModel.build(ModelArguments(str(root / "encoder")), data_args, train_args)
    examples = TrainDataset(data_args, table, tokenizer)
    collator = QPCollator(tokenizer, max_p_len=16, max_q_len=32)
    examples.trainer = OfThisVersion(model=model, args=train_args, train_dataset=examples, data_collator=collator)
    before = weights(model)
    examples.trainer.train()
    assert changed(before, model)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
