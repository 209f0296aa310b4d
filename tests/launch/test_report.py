"""What a report makes of a run's logs: the last word of a step counts, torn lines do not, swaps and versions are found."""

import json

from launch.report.history import read_history
from launch.report.plots import as_svg, draw_all


def write_logs(run, trainer=(), miner=()):
    (run / "logs").mkdir()
    for name, lines in (("metrics", trainer), ("miner", miner)):
        (run / "logs" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def step(number, loss, **values):
    times = {f"time/{part}_s": 0.1 for part in ("encode", "loss", "backward", "data")} | {"time/step_s": 0.5}
    return {"step": number, "loss": loss, "tokens_per_rank_per_s": 100.0, "memory/peak_gib": 1.0, **times, **values}


def test_a_step_that_was_done_twice_counts_as_it_was_done_last(tmp_path):
    write_logs(tmp_path, [step(1, 3.0), step(2, 2.0), step(2, 2.5), step(3, 1.0)])
    with open(tmp_path / "logs" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert read_history(tmp_path).of_steps("loss") == ([1, 2, 3], [3.0, 2.5, 1.0])


def test_swaps_evaluations_and_versions_are_found(tmp_path):
    swap = {"step": 2, "event": "negatives swapped", "negatives/version": 1}
    published = {
        "step": 0,
        "event": "published",
        "version": 1,
        "dropped": {"judged": 3},
        "audit": {"recall": None},
        "seconds": {},
    }
    write_logs(tmp_path, [{"step": 0, "dev/ndcg@10": 0.5}, step(1, 1.0), swap, {"step": 1, "event": "saved"}], [published])
    history = read_history(tmp_path)
    assert history.swaps == [(2, 1)] and history.of_measures("dev/ndcg@10") == ([0], [0.5])
    assert history.versions[1]["dropped"] == {"judged": 3}


def test_pictures_are_drawn_of_what_is_there(tmp_path):
    write_logs(tmp_path, [step(number, 1 / number) for number in range(1, 200)])
    pictures = draw_all(read_history(tmp_path))
    assert list(pictures) == ["loss", "throughput", "step_time", "memory"]
    svg = as_svg(pictures["loss"][1], "loss")
    assert svg.startswith("<svg") and 'id="loss-' in svg and 'href="#loss-' in svg


def test_a_run_without_a_step_has_no_pictures(tmp_path):
    assert draw_all(read_history(tmp_path)) == {}
