"""What `negpool compare` says of two runs: what differs, which is better query by query, and what stands in the way."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from launch.__main__ import main
from launch.compare import compare_runs, read_runs
from launch.compare_tables import compare_parts
from launch.report.comparison import draw_comparison, minutes_at, write_comparison
from launch.report.drawing import as_png
from launch.report.page import write_report
from launch.tables import Sheet
from tests.launch.run_folders import BETTER, row, write_each, write_run
from tests.tiny import write_tiny_dataset
from trainer.errors import InputError

FIRST, SECOND = [1, 1 / 2, 1, 0, 1 / 3, 1, 1, 1], [1, 1, 1, 1 / 2, 1 / 3, 1 / 4, 1, 1]  # reciprocal places of eight queries


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    data = write_tiny_dataset(folder / "data")
    first = write_run(folder / "first", data, verdict=BETTER, intervals={"trained": {"mrr@10": [0.5, 0.7]}})
    second = write_run(folder / "second", data, ["optim.lr=1e-3", "filter.range_max=30"], trained=row(0.7))
    write_each(first, trained=FIRST)
    write_each(second, trained=SECOND)
    return [first, second]


def sheet(found, title):
    return next(part for part in compare_parts(found) if isinstance(part, Sheet) and part.title.startswith(title))


def test_settings_that_differ_are_named_and_others_are_not(runs):
    found = compare_runs(read_runs(runs))
    assert found["settings"] == {"optim.lr": [2e-05, 1e-3], "filter.range_max": ["off", 30]}
    assert found["notes"] == []


def test_results_have_intervals_and_what_is_alike_stands_there_once(runs):
    rows = sheet(compare_runs(read_runs(runs)), "test queries").rows
    assert [line[0] for line in rows] == [
        "BM25, all runs", "untrained model, all runs", "first: trained model", "second: trained model",
    ]  # fmt: skip
    assert rows[2][1:3] == ("0.600", "0.600\n0.50-0.70") and rows[3][2] == "0.700"


def test_trained_models_are_compared_query_by_query(runs):
    """The interval is that of scipy's bootstrap, which draws other resamples: of eight queries its ends vary by some .01."""
    (found,) = compare_runs(read_runs(runs))["paired"]
    gains = [b - a for a, b in zip(FIRST, SECOND, strict=True)]
    interval = scipy.stats.bootstrap((gains,), np.mean, method="percentile", rng=0).confidence_interval
    assert found["differences"]["mrr@10"] == pytest.approx(sum(gains) / 8)
    assert found["intervals"]["mrr@10"] == pytest.approx([interval.low, interval.high], abs=0.02)


@pytest.mark.parametrize(
    "gain, spread, words",
    [(0.006, 0.2, "is not clearly better than"), (0.3, 0.1, "is better than"), (-0.3, 0.1, "is worse than")],
)
def test_a_sentence_says_what_the_difference_means(runs, gain, spread, words):
    """By stop.measure; scipy's bootstrap gives the interval."""
    first, second = (replace(run, job={**run.job, "stop.measure": "mrr@10"}) for run in read_runs(runs))
    gain_Q = gain + spread * np.random.default_rng(0).standard_normal(200)
    base_QM = np.full((200, 4), 0.5)
    found = compare_runs([replace(first, each_QM=base_QM), replace(second, each_QM=base_QM + gain_Q[:, None])])
    interval = scipy.stats.bootstrap((gain_Q,), np.mean, method="percentile", rng=0).confidence_interval
    sentence = next(part for part in compare_parts(found) if isinstance(part, str) and part.startswith("second "))
    assert sentence.startswith(f"second {words} first: MRR@10 {gain_Q.mean():+.3f}, 95 % interval ")
    ends = [float(end) for end in sentence.rstrip(".").rpartition("interval ")[2].split(" to ")]
    assert ends == pytest.approx([interval.low, interval.high], abs=0.01)


def test_a_run_without_test_queries_is_not_called_unclear(runs):
    first, second = read_runs(runs)
    untested = replace(second, rows=[], verdict=replace(second.verdict, level="unclear"))
    facts = {line[0]: line[1:] for line in sheet(compare_runs([first, untested]), "the runs").rows}
    assert facts["verdict"] == ("better", "not tested")


def test_what_runs_cost_is_told(runs):
    facts = {line[0]: line[1:] for line in sheet(compare_runs(read_runs(runs)), "the runs").rows}
    assert facts["verdict"] == ("better", "finished") and facts["steps"] == ("10 of 10", "10 of 10")
    assert facts["time"] == ("1:05", "1:05") and facts["mined versions swapped in"] == ("1", "1")
    assert facts["tokens/s a rank"] == ("100", "100") and facts["peak memory, GiB"] == ("1", "1")


def test_runs_that_are_not_alike_are_compared_with_a_sentence_on_why_not(runs, tmp_path):
    other = write_run(tmp_path / "other", write_tiny_dataset(tmp_path / "data", seed=1), ["eval.split=dev"])
    write_each(other, trained=FIRST)
    (tmp_path / "other" / "results.json").unlink()
    found = compare_runs(read_runs([runs[0], other]))
    assert found["paired"] == [], "other queries"
    assert [note.split(" (")[0] for note in found["notes"][:2]] == [
        "The runs are of different data",
        "The runs were tested on different splits",
    ]
    assert found["notes"][2].startswith("other has no test results. This run has ended at step 10")


def test_every_run_is_a_line_over_steps_and_over_time(runs):
    read = read_runs(runs)
    pictures = draw_comparison(read)
    assert list(pictures) == ["quality", "quality_time", "loss"]
    lines = {line.get_label(): line.get_xydata() for line in pictures["quality"][1].axes[0].lines}
    np.testing.assert_allclose(lines["first, dev"], [[4, 0.4], [8, 0.5]])
    np.testing.assert_allclose(lines["second, trained, test"], [[10, 0.7]])
    assert {"BM25, test", "untrained model, test"} <= lines.keys()
    over_time = {line.get_label(): line.get_xydata() for line in pictures["quality_time"][1].axes[0].lines}
    np.testing.assert_allclose(over_time["first, dev"], [[4 * 0.5 / 60, 0.4], [8 * 0.5 / 60, 0.5]])
    assert minutes_at(read[0])[10] == pytest.approx(5 / 60)


def test_legends_name_every_run_and_fit_into_the_picture(runs):
    names = ("_base", "a run with a name that is far too long for any legend that was ever drawn")
    read = [replace(run, name=name) for run, name in zip(read_runs(runs), names, strict=True)]
    figure = draw_comparison(read)["quality"][1]
    as_png(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][::2] == [" _base, dev", "a run with a… ever drawn, dev", "BM25, test"]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0


def test_a_page_shows_tables_and_pictures(runs, tmp_path):
    read = read_runs(runs)
    page = write_comparison(read, compare_runs(read), tmp_path / "out")
    text = page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "quality.png", "quality_time.png", "loss.png"}
    for words in ("optim.lr", "second - first", BETTER["sentence"], "first: trained model", '<figure id="quality_time"'):
        assert words in text, words


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "first").symlink_to(runs[1])
    names = [run.name for run in read_runs([runs[0], tmp_path / "b" / "first"])]
    assert names == [f"{runs[0].parent.name}/first", "b/first"]


def test_a_folder_that_is_no_run_is_one_sentence(runs, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        read_runs([runs[0], tmp_path])
    with pytest.raises(InputError, match="two or more different runs"):
        read_runs([runs[0], runs[0]])
    with pytest.raises(InputError, match="two or more different runs"):
        read_runs(runs[:1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("job.toml", "= 5"),
        ("job.toml", "run = 5"),
        ("results.json", "{"),
        ("results.json", '{"bm25": 3}'),
        ("results.json", '{"verdict": "good"}'),
        ("results.json", '{"verdict": {"level": 1}}'),
        ("results.json", json.dumps({"trained": row(0.5), "intervals": {"trained": {"mrr@10": [0.5]}}})),
        ("status/trainer.json", '{"warnings": 5, "phase": "training"}'),
        ("logs/metrics.jsonl", '[1]\n{"step": "x"}\n'),
        ("logs/metrics.jsonl", '{"step": 1, "loss": 0.5}\n'),
    ],
)
def test_a_folder_that_holds_something_else_is_one_sentence_for_both(runs, tmp_path, name, content):
    """Whatever can be shown of it is shown; where nothing can, the folder is named, and nobody sees a traceback."""
    broken = tmp_path / "broken"
    for file in ("job.toml", "results.json", "status/trainer.json", "logs/metrics.jsonl"):
        (broken / file).parent.mkdir(parents=True, exist_ok=True)
        (broken / file).write_bytes((runs[0] / file).read_bytes())
    (broken / name).write_text(content)
    for show in (lambda: compare_parts(compare_runs(read_runs([runs[0], broken]))), lambda: write_report(broken, None)):
        try:
            assert show()
        except InputError as error:
            assert str(broken) in str(error)


def test_the_command_prints_tables_or_one_object(runs, tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr("sys.argv", ["negpool", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    code, out, _ = call(*runs, "--json")
    assert code == 0 and [run["name"] for run in json.loads(out)["runs"]] == ["first", "second"]
    code, out, _ = call(*runs)
    assert code == 0 and "optim.lr" in out and "second - first" in out
    code, out, said = call(runs[0], tmp_path)
    assert code == 2 and out == "" and len(said.strip().splitlines()) == 1, said
