"""What a report makes of a run: the last word of a step counts, what is there is shown, what is not is said in a sentence."""

import json
import logging
import re
import shutil
import warnings

import matplotlib.text
import numpy as np
import pytest

from launch.jobfile import read_job
from launch.report.before_after import places, read_before_after
from launch.report.drawing import MOST_POINTS, as_svg, picture, running_median, thinned
from launch.report.examples import excerpt, read_examples
from launch.report.history import read_history
from launch.report.page import write_report
from launch.report.plots import draw_all
from launch.report.standing import rows_of, verdict_of, warnings_of
from launch.status import run_status
from mining.table.judgements import read_judgements
from tests.launch.run_folders import BETTER, published, row, step, write_each, write_json, write_lines, write_run
from tests.tiny import write_tiny_dataset
from trainer.data.datasets import open_data
from trainer.data.row import Entry
from trainer.errors import InputError
from trainer.handoff.negatives import publish_negatives

# Reciprocal places of the first relevant passage of eight test queries; 0: not among the first hundred.
BEFORE, AFTER = [1, 1, 1 / 2, 1 / 3, 0, 1, 1, 1], [1, 1 / 10, 1, 1 / 3, 1 / 4, 1, 1, 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run with all that a report can show, and its page."""
    intervals = {"trained": {"mrr@10": [0.5, 0.7]}, "trained - untrained": {name: [0.05, 0.25] for name in row(0)}}
    of_verdict = {"hard": "Hardly any negative is hard.", "few": "The queries are few."}
    verdict = BETTER | {"warnings": [{"kind": kind, "sentence": sentence} for kind, sentence in of_verdict.items()]}
    more = {"last": row(0.55), "steps": {"trained": 8, "last": 10}, "intervals": intervals, "verdict": verdict}
    run = write_run(tmp_path_factory.mktemp("whole") / "run", data, **more)
    write_each(run, untrained=BEFORE, trained=AFTER)
    of_miner = [{"kind": "hard", "sentence": "Hardly any negative is hard.", "step": 4}]
    write_json(run / "status" / "miner.json", {"phase": "watching", "warnings": of_miner, "refused": "recall 0.5"})
    trainer = json.loads((run / "status" / "trainer.json").read_text())
    of_trainer = [{"kind": "dev", "sentence": "Dev fell.", "step": 8}]
    write_json(run / "status" / "trainer.json", trainer | {"warnings": of_trainer})
    return run, write_report(run, None)


def write_logs(run, trainer=(), miner=()):
    write_lines(run / "logs" / "metrics.jsonl", trainer)
    write_lines(run / "logs" / "miner.jsonl", miner)


def standing(run):
    status = run_status(run)
    return verdict_of(status), warnings_of(status), rows_of(status, read_history(run))


def test_a_step_that_was_done_twice_counts_as_it_was_done_last(tmp_path):
    write_logs(tmp_path, [step(1, 3.0), step(2, 2.0), step(2, 2.5), step(3, 1.0)])
    with open(tmp_path / "logs" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert read_history(tmp_path).of_steps("loss") == ([1, 2, 3], [3.0, 2.5, 1.0])


def test_swaps_evaluations_and_versions_are_found(tmp_path):
    swap = {"step": 2, "event": "negatives swapped", "negatives/version": 1}
    lines = [{"step": 0, "dev/ndcg@10": 0.5}, step(1, 1.0), swap, {"step": 1, "event": "saved"}]
    write_logs(tmp_path, lines, [published(1)])
    history = read_history(tmp_path)
    assert history.swaps == [(2, 1)] and history.of_measures("dev/ndcg@10") == ([0], [0.5])
    assert history.versions[1]["dropped"] == {"equal_texts": 3}


def test_pictures_are_drawn_of_what_is_there(tmp_path):
    write_logs(tmp_path, [step(number, 1 / number) for number in range(1, 200)])
    pictures = draw_all(read_history(tmp_path), [], "ndcg@10")
    assert list(pictures) == ["loss", "gradient", "throughput", "step_time", "memory"]
    svg = as_svg(pictures["loss"][1], "loss")
    assert svg.startswith("<svg") and 'id="loss-' in svg and 'href="#loss-' in svg
    assert draw_all(read_history(tmp_path / "nothing"), [], "ndcg@10") == {}


def test_every_picture_has_a_title_labels_with_units_and_a_legend_of_several_lines(tmp_path, data):
    run = write_run(tmp_path / "run", data)
    status, history = run_status(run), read_history(run)
    pictures = draw_all(history, rows_of(status, history), "mrr@10")
    assert {"quality", "scores", "filters", "audit", "refresh"} <= pictures.keys()
    for name, (title, figure) in pictures.items():
        (axes,) = figure.axes
        assert axes.get_title(loc="left") == title and axes.get_xlabel() and axes.get_ylabel(), name
        labels = axes.get_legend_handles_labels()[1]
        assert bool(figure.legends) == (len(labels) > 1), name
    legend = [text.get_text() for text in pictures["quality"][1].legends[0].findobj(matplotlib.text.Text)]
    wanted = ("BM25, test: 0.300", "untrained model, test: 0.450", "trained model, test: 0.600", "dev queries, while training")
    assert set(wanted) <= set(legend)


def test_scores_of_bm25_are_not_drawn_beside_those_of_a_model(tmp_path):
    write_logs(tmp_path, [], [published(0, "bm25"), published(1)])
    (axes,) = draw_all(read_history(tmp_path), [], "ndcg@10")["scores"][1].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["v1"]


def test_a_long_line_is_thinned_and_keeps_its_peaks():
    values = [1.0] * 100_000
    values[54_321] = 9.0
    places, kept = thinned((list(range(100_000)), values))
    assert len(kept) <= MOST_POINTS and kept[places.index(54_321)] == 9.0 and places == sorted(places)


def test_a_running_median_is_that_of_the_whole_line():
    values = np.random.default_rng(0).random(20_000)
    places, medians = running_median((list(range(20_000)), values.tolist()))
    assert len(places) <= MOST_POINTS and (places[0], places[-1]) == (0, 19_999)
    at = len(places) // 2
    assert medians[at] == np.median(values[places[at] - 500 : places[at] + 501]), "a twentieth of the line"


def test_numbers_of_an_axis_are_numbers(tmp_path):
    """Also of a logarithmic one, although names of runs are not typeset."""
    write_logs(tmp_path, [step(number, 1.0, grad_norm=10.0**-number) for number in range(1, 5)])
    figure = draw_all(read_history(tmp_path), [], "ndcg@10")["gradient"][1]
    as_svg(figure, "gradient")
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "0.01" in shown and not any("$" in text for text in shown)
    write_logs(tmp_path, [step(1, 1.0)])
    (axes,) = draw_all(read_history(tmp_path), [], "ndcg@10")["loss"][1].axes
    assert all(place == round(place) for place in axes.get_xticks())


def test_drawing_says_nothing_whatever_a_run_is_called(caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        with picture("検索 $x^$ \N{GREEK SMALL LETTER ALPHA}", "step", "score") as (figure, axes):
            axes.plot([1], [float("nan")], label="\U00010380")
        as_svg(figure, "name")
    assert caplog.messages == []


def test_the_verdict_and_the_warnings_of_a_run_come_first(whole):
    run, page = whole
    verdict, warned, _ = standing(run)
    assert (verdict.level, verdict.sentence) == ("better", BETTER["sentence"])
    assert warned == [
        ("miner", "Hardly any negative is hard. (step 4)"),
        ("results", "The queries are few."),
        ("trainer", "Dev fell. (step 8)"),
        ("miner", "A version was given up: recall 0.5"),
    ]
    text = page.read_text()
    assert text.index(BETTER["sentence"]) < text.index("Dev fell.") < text.index('id="results"') < text.index("<svg")


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({}, "has not started"),
        ({"phase": "training", "step": 3, "num_steps": 10}, "not ended: its trainer is training, at step 3 of 10"),
        ({"phase": "stopped", "step": 3, "num_steps": 10}, "stopped and saved at step 3 of 10"),
        ({"phase": "must not go on", "step": 3, "num_steps": 9, "error": "it collapsed."}, "only have got worse: it collapsed."),
        ({"phase": "failed", "step": 3, "num_steps": 9, "error": "a rank was lost"}, "with an error: a rank was lost."),
        ({"phase": "finished", "step": 9, "num_steps": 9}, "holds no verdict"),
    ],
)
def test_a_run_without_a_verdict_says_where_it_stands(tmp_path, data, trainer, words):
    run = write_run(tmp_path / "run", data)
    (run / "results.json").unlink()
    write_json(run / "status" / "trainer.json", trainer)
    assert words in standing(run)[0].sentence


def test_best_and_last_are_rows_with_steps_and_intervals(whole):
    run, page = whole
    titles = [(each.title, each.step) for each in standing(run)[2]]
    assert titles[2:] == [("trained model, best on dev", 8), ("trained model, last step", 10)]
    table = re.search(r'<table id="results">.*?</table>', page.read_text(), re.DOTALL)[0]
    assert "0.50-0.70" in table and "+0.150" in table and "+0.050 to +0.250" in table and "step 8" in table


def test_the_same_queries_are_shown_before_and_after(whole, data):
    run, page = whole
    found = read_before_after(run)
    assert (found.num_better, found.num_worse, found.num_same) == (2, 1, 5)
    assert [(each["before"], each["after"]) for each in found.queries] == [("2", "1"), ("not in 100", "4"), ("1", "10")]
    query = json.loads((data / "queries.jsonl").read_text().splitlines()[10])  # the second test query of q4, q10, …
    assert found.queries[2]["query"]["text"] == query["text"]
    assert "better for 2" in page.read_text() and query["text"] in page.read_text()


def test_places_beyond_the_tenth_are_known_roughly():
    each_QM = np.array([[0.3, 1 / 7, 1, 1], [0, 0, 0, 0.5], [0, 0, 0, 0]])
    assert places(each_QM).tolist() == [7, 50, 1000]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"each": {"mrr@10": [1]}}', '{"each": {"mrr@10": "x"}}'])
def test_an_evaluation_that_kept_nothing_of_each_query_is_named(tmp_path, content):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "untrained.json").write_text(content)
    with pytest.raises(InputError, match=r"nothing is known of single queries in .*untrained\.json"):
        read_before_after(tmp_path)


@pytest.mark.parametrize("split, words", [("test", "was not tested on test, or has not ended"), ("exam", "negpool data split")])
def test_a_run_that_was_not_tested_says_so(tmp_path, data, split, words):
    with pytest.raises(InputError, match=f"the run was not tested|{words}") as error:
        read_before_after(write_run(tmp_path / "run", data, [f"eval.split={split}"]))
    assert words in str(error.value)


def test_dev_begins_with_the_untrained_model(tmp_path, data):
    run = write_run(tmp_path / "run", data)
    write_json(run / "evaluations" / "dev" / "untrained.json", {"step": 0, "split": "dev", **row(0.37)})
    history = read_history(run)
    assert history.of_measures("dev/ndcg@10") == ([0, 4, 8], [0.37, 0.4, 0.5]) and not history.of_measures("eval/ndcg@10")[0]
    title, figure = draw_all(history, [], "ndcg@10")["quality"]
    assert "dev and test are different queries" in title
    assert figure.axes[0].lines[0].get_ydata()[0] == 0.37 and "untrained" in figure.axes[0].lines[0].get_label()


def test_swaps_are_counted_as_the_terminal_counts_them(tmp_path, data):
    run = write_run(tmp_path / "run", data)
    swaps = [{"step": s, "event": "negatives swapped", "negatives/version": s - 1} for s in (1, 2, 3)]
    write_lines(run / "logs" / "metrics.jsonl", swaps)
    assert "<b>2</b><span>versions of mined negatives swapped in<" in write_report(run, tmp_path / "out").read_text()


def test_a_run_of_which_little_is_there_has_a_page_that_says_so(tmp_path, data):
    run = write_run(tmp_path / "run", data)
    shutil.rmtree(run / "logs")
    (run / "results.json").unlink()
    text = write_report(run, tmp_path / "out").read_text()
    for words in ("the run was not tested on test", "has no negatives for this data", "No step has been taken yet"):
        assert words in text, words


def test_examples_have_the_scores_of_positives_beside_those_of_negatives(tmp_path, data):
    run = write_run(tmp_path / "run", data)
    judgements = read_judgements(open_data(read_job(run / "job.toml", []).mine.data, {}), "train")
    num_queries, num_positives = judgements.num_queries, len(judgements.positive_rows)
    indptr, ids = np.arange(num_queries + 1) * 2, np.tile([3, 7], num_queries)
    scores = np.tile(np.array([0.25, 0.5], np.float32), num_queries)
    positive_scores = np.linspace(0.6, 0.9, num_positives, dtype=np.float32)
    publish_negatives(run, 1, indptr, ids, scores, {"source": "model"}, positive_scores=positive_scores)
    found = read_examples(run)
    assert (found.version, found.scores) == (1, "the model's") and len(found.queries) == 8
    first, last = found.queries[0], found.queries[-1]
    of_first = positive_scores[: judgements.positive_indptr[1]].tolist()
    assert [each["score"] for each in first["positives"]] == sorted(of_first, reverse=True) and len(of_first) == 2
    assert last["positives"][-1]["score"] == pytest.approx(positive_scores[-1])
    assert [each["score"] for each in first["negatives"]] == [0.5, 0.25], "the hardest first"


def test_an_excerpt_is_short_and_code_is_known_by_its_indentation():
    prose, code = Entry("a", "Title and a " + "very " * 1000, title_length=5), Entry("b", "def f():\n    return 1")
    assert excerpt(prose)["title"] == "Title" and excerpt(prose)["text"].startswith("and a very")
    assert len(excerpt(prose)["text"]) < 700 and excerpt(prose)["text"].endswith("…") and not excerpt(prose)["is_indented"]
    assert excerpt(code) == {"title": "", "text": "def f():\n    return 1", "is_indented": True}


def test_queries_of_other_data_are_not_compared(tmp_path, data):
    run = write_run(tmp_path / "run", data)
    write_each(run, untrained=[1.0] * 3, trained=[1.0] * 3)
    with pytest.raises(InputError, match=r"about 3 queries, and .* has 8"):
        read_before_after(run)


def test_a_page_needs_no_network_and_explains_its_pictures(whole):
    text = whole[1].read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', text), "all is inside"
    assert set(re.findall(r'<figure id="(\w+)"', text)) == {path.stem for path in whole[1].parent.glob("*.png")}
    for term in ("nDCG@10", "95 % interval", "norm of the gradient", "age", "suspected false negatives", "overlap with"):
        assert f"<dt>{term}" in text, term
