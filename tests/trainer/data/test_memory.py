"""A large data set stays on disk: by-hand figures for two million passages come from the same program."""

from tests.trainer.data.memory import measure

NUM_PASSAGES = 100_000
LIMIT_MIB = 60  # two million passages take 111 MiB, of 300 allowed; what does not follow the size is in both


def test_opening_tokens_and_batches_of_a_large_corpus_takes_little_memory(tmp_path):
    found = measure(tmp_path / "data", NUM_PASSAGES)
    assert found["passages"] == NUM_PASSAGES
    assert found["growth_mib"] < LIMIT_MIB
    assert found["tables_made_first"] == found["tables"] == 3 and found["tables_made"] == 0, "found again, not made again"
