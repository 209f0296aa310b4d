"""What a person reads while mining goes on."""

import io
import json
import time

from rich.console import Console

from launch.mine_progress import Pace, followed, progress_line


def test_the_time_that_is_left_follows_the_rate_since_a_phase_began():
    pace = Pace()
    assert pace.left_s("encoding", 0, 0, 5.0) is None, "nothing is counted yet"
    assert pace.left_s("encoding", 400, 1000, 10.0) is None, "what was on disk before says nothing"
    assert pace.left_s("encoding", 450, 1000, 11.0) is None, "one second is too short"
    assert pace.left_s("encoding", 600, 1000, 20.0) == 20.0  # 200 texts in ten seconds, 400 to go
    assert pace.left_s("searching", 600, 1000, 21.0) is None, "another phase has another rate"
    assert pace.left_s("searching", 700, 1000, 31.0) == 30.0
    assert pace.left_s("searching", 10, 1000, 41.0) is None, "a phase that begins again is measured again"


def test_a_line_says_phase_amount_and_time_left():
    assert progress_line("loading", 0, 0, None) == "loading"
    assert progress_line("encoding", 1200, 45000, 95.0) == "encoding  1,200 of 45,000 texts, about 1:35 left"
    assert progress_line("searching", 512, 512, 0.0) == "searching  512 of 512 queries"
    assert progress_line("clustering", 3, 9, None) == "clustering  3 of 9"


def test_a_log_gets_a_line_for_each_phase(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.mine_progress.LOOK_EVERY_S", 0.01)
    said = io.StringIO()
    status = tmp_path / "status" / "miner.json"
    status.parent.mkdir()
    with followed(tmp_path, Console(file=said, soft_wrap=True)):
        for values in ({"phase": "loading"}, {"phase": "encoding", "done": 5, "total": 10}, {"phase": "publishing"}):
            status.write_text(json.dumps(values))
            while values["phase"] not in said.getvalue():
                time.sleep(0.005)
    lines = [line.partition("  ")[2] for line in said.getvalue().splitlines()]
    assert [line for line in lines if line != "starting"] == ["loading", "encoding  5 of 10 texts", "publishing"]
