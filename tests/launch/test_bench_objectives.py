"""`negpool bench objectives`: every loss has its turn, and the report is written."""

import json

from typer.testing import CliRunner

from gradcache import OBJECTIVES
from launch.bench import objectives
from launch.commands import app


def test_every_loss_that_looks_at_tiles_is_measured_against_info_nce(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "ROWS", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(objectives, "COLUMNS", {"cpu": 96, "cuda": 96})
    done = CliRunner().invoke(app, ["bench", "objectives", "--rounds", "1", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "objectives.json").read_text())["objectives"]
    assert {name for name, named in OBJECTIVES.items() if named.cost is not None} <= found.keys()
    assert not found.keys() & {"cosent", "angle", "correlation"} and found["info_nce"]["ratio"] == 1
    assert {name for name, row in found.items() if row["wanted"]} == set(objectives.COMMON)
    assert (tmp_path / "objectives.md").exists() and (tmp_path / "objectives.png").exists()
