"""CSV and TSV are read as pandas reads them, and what is wrong with them is said with its line."""

import csv
import gzip

import pandas as pd
import pytest

from tests.trainer.data.test_record_conventions import ONE, PAIR, N, P, Q, blemishes, meaning
from trainer.data.check import check_dataset
from trainer.data.datasets import open_dataset
from trainer.errors import InputError

TABLE = [
    {"query": Q, "positive": 'say "sort", twice', "negative": N},
    {"query": "two\nlines", "positive": "a, b", "negative": ""},
    {"query": "tab\there", "positive": "x;y", "negative": "ä"},
]


def write_csv(path, records, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(records).to_csv(path, **{"index": False, "sep": "\t" if ".tsv" in path.name else ","} | options)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz", "train.csv"])
@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL}, {"encoding": "utf-8-sig"}, {"lineterminator": "\r\n"}])
def test_csv_is_read_as_pandas_reads_it(tmp_path, name, options):
    path = write_csv(tmp_path / name, TABLE, **options)
    table = pd.read_csv(path, sep="\t" if ".tsv" in name else ",", encoding="utf-8-sig")
    expected = {
        row.query: ({row.positive: 1}, set() if pd.isna(row.negative) else {row.negative})
        for row in table.itertuples(index=False)
    }
    assert meaning(open_dataset(path, tmp_path / "cache")) == expected and check_dataset(path).problems == []


def test_a_place_in_csv_is_the_line_on_which_its_row_begins(tmp_path):
    path = write_csv(tmp_path / "a.csv", [*TABLE, {"query": "", "positive": "x"}, {"query": "z", "positive": "y"}])
    lines = path.read_text().split("\n")
    assert blemishes(path) == [("empty text", next(n for n, line in enumerate(lines, 1) if line == ",x,"))]
    path.write_text(path.read_text() + "one,two\n")
    with pytest.raises(InputError, match=r"a\.csv:8: found 2 cells, expected 3 as in the first line"):
        open_dataset(path, tmp_path / "cache")
    path.write_text('query,positive\na,b\n"c" d,e\n')
    with pytest.raises(InputError, match=r"a\.csv:3: the row that begins here is not CSV: .*double the quotes"):
        open_dataset(path, tmp_path / "cache")
    path.write_bytes("query,positive\nä,b\n".encode("latin1"))
    with pytest.raises(InputError, match=r"a\.csv:2: byte 1 of this line is not UTF-8"):
        open_dataset(path, tmp_path / "cache")
    path.write_text("query,query\na,b\n")
    with pytest.raises(InputError, match=r"a\.csv:1: two columns have one name"):
        open_dataset(path, tmp_path / "cache")
    path.write_text("")
    with pytest.raises(InputError, match=r"a\.csv: this file has no sound record"):
        open_dataset(path, tmp_path / "cache")


def test_a_cut_off_csv_is_refused(tmp_path):
    path = write_csv(tmp_path / "a.csv.gz", TABLE * 50)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"a\.csv\.gz: this gzip file is cut off"):
        open_dataset(path, tmp_path / "cache")


def test_csv_of_spreadsheets_and_of_pandas_with_index_is_read(tmp_path):
    path = write_csv(tmp_path / "a.csv", TABLE, sep=";")
    assert len(meaning(open_dataset(path, tmp_path / "cache"))) == 3
    path = write_csv(tmp_path / "b.csv", TABLE, index=True)
    assert blemishes(path) == [("column not used", 2)] and len(meaning(open_dataset(path, tmp_path / "cache"))) == 3


def test_labels_of_csv_are_numbers(tmp_path):
    frame = [{"question": Q, "answer": P, "label": 1}, {"question": Q, "answer": N, "label": 0}]
    assert meaning(open_dataset(write_csv(tmp_path / "a.csv", frame), tmp_path / "cache")) == ONE
    frame = [{"sentence1": Q, "sentence2": P, "label": True}, {"sentence1": Q, "sentence2": N, "label": False}]
    assert meaning(open_dataset(write_csv(tmp_path / "b.tsv", frame), tmp_path / "cache")) == ONE


def test_text_triples_of_ms_marco_are_read_as_they_are(tmp_path):
    lines = [('what is "x"', 'it is "x', "no 'x'"), ("is a a b", "a is b", "c is d")]
    content = "".join("\t".join(line) + "\n" for line in lines)
    expected = {query: ({positive: 1}, {negative}) for query, positive, negative in lines}
    (tmp_path / "triples.train.small.tsv").write_text(content)
    with gzip.open(tmp_path / "triples.tsv.gz", "wt") as file:
        file.write(content)
    for name in ("triples.train.small.tsv", "triples.tsv.gz"):
        assert meaning(open_dataset(tmp_path / name, tmp_path / "cache")) == expected
    (tmp_path / "qidpidtriples.train.tsv").write_text("1\t23\t45\n2\t34\t56\n")
    with pytest.raises(InputError, match=r"found the columns 1, 23, 45; .*columns = "):
        open_dataset(tmp_path / "qidpidtriples.train.tsv", tmp_path / "cache")


def test_a_file_that_names_no_columns_is_read_by_their_numbers(tmp_path):
    (tmp_path / "a.tsv").write_text(f"{P}\t7\t{Q}\n")
    columns = {"query": "2", "positive": "0"}
    assert meaning(open_dataset(tmp_path / "a.tsv", tmp_path / "cache", columns)) == PAIR
    with pytest.raises(InputError, match=r'a\.tsv:2: .*or "0" and "1" of a file|a\.tsv: this file has no sound record'):
        open_dataset(tmp_path / "a.tsv", tmp_path / "cache")
    (tmp_path / "b.csv").write_text(f"0,1\n{Q},{P}\n")  # pandas writes its numbers of columns as names
    assert meaning(open_dataset(tmp_path / "b.csv", tmp_path / "cache", {"query": "0", "positive": "1"})) == PAIR
