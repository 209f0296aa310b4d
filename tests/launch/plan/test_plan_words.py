"""What a plan refuses, in a sentence, and what it prints, writes and tells `negpool submit`."""

import json
import re

import pytest
from typer.testing import CliRunner

from launch.commands import app
from launch.jobfile import read_job
from launch.plan.devices import TABLE, find_device, read_device, write_device
from launch.plan.submission import foresee_submission, refuse_impossible
from tests.tiny import write_tiny_encoder
from trainer.errors import InputError

NET = ["--fabric", "nvlink-ib400"]
TEXTS = ["--query-tokens", "10", "--passage-tokens", "20", "--training-queries", "900", "--passages", "5000"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_tiny_encoder(folder / "encoder")
    text = f'[model]\nname = "{folder}/encoder"\n[batch]\nqueries = 64\n[data]\npath = "{folder}/none"\n'
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "h10O", *NET], r"--device h10O is no device that a plan knows; did you mean h100\?"),
        (["--device", "there/is/none.toml", *NET], "there is no device file there/is/none.toml"),
        (["--ranks", "0,2", *NET], "--ranks 0,2 has no rank in it"),
        (["--ranks", "two", *NET], "--ranks two is no list of numbers"),
        (["--ranks", "128", *NET], "batch.queries=64 is less than the 128 ranks"),
        (["--ranks", "2"], "2 ranks send each other something; name what joins them by --fabric"),
        (["--ranks", "2", "--fabric", "nvlink-ib40"], "did you mean nvlink-ib400"),
        (["--mode", "wide", *NET], "--mode wide is no mode of scaling; expected strong or weak"),
        (["--query-tokens", "0", *NET], "--query-tokens 0 is no length of a text"),
        (["model.name=there/is-none", "--ranks", "1"], "model.name='there/is-none' is not a model that can be loaded"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(job, words, said):
    done = call("plan", job, *words)
    assert isinstance(done.exception, InputError) and re.search(said, str(done.exception)), done.exception


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("memory_gib = -1", r"memory_gib=-1, expected a number > 0"),
        ("both_share = 1.5", r"both_share=1.5, expected a share of matmul_flops_per_s, at most 1"),
        ("launch_s = true", r"launch_s=True, expected a number > 0"),
        ('type = "tpu"', r"type='tpu', expected \"cuda\" or \"cpu\""),
        ("name = 5", r"name=5, expected text"),
        ("memory_gb = 80", r"unknown key memory_gb; did you mean memory_gib\?"),
        ("", r"has no launch_s"),
    ],
)
def test_a_device_file_with_a_wrong_constant_is_refused_by_its_key(tmp_path, line, said):
    file = tmp_path / "device.toml"
    write_device(file, TABLE["h100"])
    assert read_device(file) == TABLE["h100"], "what is written is read"
    key = line.partition(" ")[0] or "launch_s"
    kept = [each for each in file.read_text().splitlines() if not each.startswith(key + " ")]
    file.write_text("\n".join([*kept, line]))
    with pytest.raises(InputError, match=said):
        find_device(str(file))


def test_the_command_prints_tables_and_leaves_files_that_it_takes_again(job, tmp_path):
    words = ["--ranks", "2,8,16", *NET, *TEXTS, "--age", "300", "--watts", "400"]
    done = call("plan", job, *words, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.exception
    for said in ("bottleneck", "efficiency", "GiB of a rank", "miner ranks for --age", "kWh", "--save-seconds needed", "can run"):
        assert said in done.output
    again = call("plan", job, *words, "--json", "--device", tmp_path / "out" / "device.toml")
    found = json.loads(again.stdout)
    kept = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["sizes"] == kept["sizes"] and [row["ranks"] for row in found["sizes"]] == [2, 8, 16]
    assert found["sizes"][2]["nodes"] == 2 and found["device"]["watts"] == 400
    assert "| ranks | 2 | 8 | 16 |" in (tmp_path / "out" / "plan.md").read_text()


def test_submit_is_told_what_the_plan_foresees_and_refuses_only_what_is_certain(job):
    jobs = read_job(job, [])
    with pytest.raises(InputError, match=r"batch\.queries=64 is less than the 72 ranks"):
        refuse_impossible(jobs, 72)
    refuse_impossible(jobs, 64)
    fine = foresee_submission(jobs, 16, 120, "h100", "nvlink-ib400")
    assert fine["warnings"] == [] and fine["sizes"][0]["ranks"] == 16
    large = read_job(job, ["model.name=Mistral-7B-v0.1", "model.max_passage_tokens=64"])
    short, slow = foresee_submission(large, 16, 120, "h100", "nvlink-ib400")["warnings"]
    assert "parallel.backend=fsdp2" in short and "submitted all the same" in short
    assert "--save-seconds 120 leaves; set it to" in slow


@pytest.mark.parametrize("name", ["bert-base", "decoder-lora", "decoder-fsdp2"])
def test_the_plans_that_the_documents_show_can_be_made_without_data_and_weights(name):
    done = call("plan", f"launch/jobs/plans/{name}.toml", "--ranks", "64,4096", *NET, *TEXTS, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["first_that_cannot_run"] is None and all(row["step_s"] > 0 for row in found["sizes"])
