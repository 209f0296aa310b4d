"""`negpool bench scaling` with a stand-in for the ranks: order, refusals, what is kept, tables and pictures."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest

from launch.bench.scaling import run, trial_jobs
from launch.bench.scaling.curves import pictures
from launch.bench.scaling.run import ScalingPlan, bench_scaling
from launch.bench.scaling.sheets import scaling_parts
from launch.bench.scaling.summary import summary
from launch.bench.scaling.trial_files import Conditions, TrialFolder
from launch.bench.scaling.trial_jobs import Allocation, nodes_of, refuse_missing_nodes
from launch.bench.scaling.trials import Trial, planned, read_modes, read_ranks, refuse_too_many
from launch.commands import app
from launch.jobfile import read_job
from launch.tables import Sheet, as_markdown
from tests.launch.scaling_stand_in import found
from tests.slurm.cluster import wait_until
from trainer.errors import InputError

ROOT = Path(__file__).parent.parent.parent
CONDITIONS = Conditions(job="0a", data="job", warm_up=10, steps=50)
ALLOCATION = Allocation(gpus_per_node=0, cpus_per_rank=1, partition=None, time=None, options=())
COMMAND = """
import sys
from launch.bench.scaling import run
run.WORKER = "tests.launch.scaling_stand_in"
from launch.leave import ctrl_c_in_one_line
from launch.__main__ import main
with ctrl_c_in_one_line():
    main()
"""


@pytest.fixture
def job(tmp_path):
    """A job's file; its queries can be divided by 1, 2 and 4."""
    for name in ("train", "dev", "test"):
        (tmp_path / "data" / "qrels").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "qrels" / f"{name}.tsv").write_text("")
    for name in ("corpus", "queries"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("")
    path = tmp_path / "job.toml"
    path.write_text(
        f'[data]\npath = "{tmp_path}/data"\n[batch]\nqueries = 8\n[negatives]\nwhen_stale = "wait"\n[launch]\ntrain_ranks = 2\n'
    )
    return path


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Let the stand-in measure; the lines of its starts."""
    monkeypatch.setattr(run, "WORKER", "tests.launch.scaling_stand_in")
    monkeypatch.setenv("NEGPOOL_TEST_TRIALS", str(tmp_path / "trials.txt"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda: (tmp_path / "trials.txt").read_text().splitlines()


def plan(**values) -> ScalingPlan:
    return ScalingPlan(**({"ranks": (1, 2), "modes": ("strong", "weak"), "rounds": 1, "data": "job"} | values))


def test_sizes_go_up_in_one_round_and_down_in_the_next():
    order = [(trial.ranks, trial.queries) for trial in planned((1, 2, 4), 8, ("strong",), 3)]
    up = [(1, 8), (2, 8), (4, 8)]
    assert order == [*up, *up[::-1], *up]


def test_both_modes_share_the_smallest_size_and_weak_scaling_keeps_the_queries_of_a_rank():
    assert [(t.ranks, t.queries) for t in planned((2, 4), 8, ("strong", "weak"), 1)] == [(2, 8), (4, 8), (4, 16)]
    assert len(planned((1, 2), 8, ("strong", "weak"), 2)) == 6


@pytest.mark.parametrize(
    ("ranks", "modes", "says"),
    [
        (
            (1, 3),
            ("strong",),
            r"batch.queries=32 cannot be divided by 3 ranks; set batch.queries to 30 or 33, the nearest that can",
        ),
        ((2, 3), ("strong", "weak"), r"set batch.queries to 30 or 36, the nearest that can, or take 3 out of --ranks"),
        ((5, 10), ("weak",), r"cannot be divided by 5 ranks; set batch.queries to 30 or 35"),
        ((64,), ("strong",), r"cannot be divided by 64 ranks; set batch.queries to 64, the nearest that can$"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_with_the_nearest(ranks, modes, says):
    with pytest.raises(InputError, match=says):
        planned(ranks, 32, modes, 1)


def test_weak_scaling_divides_the_batch_of_the_smallest_size_alone():
    assert [trial.queries for trial in planned((1, 3), 32, ("weak",), 1)] == [32, 96]


@pytest.mark.parametrize("words", ["", " , ", "1,two", "0,1", "-1", "1.5"])
def test_sizes_that_are_none_are_refused(words):
    with pytest.raises(InputError, match=r"names no sizes; expected numbers of ranks with commas between them, as 1,2,4"):
        read_ranks(words)


@pytest.mark.parametrize("words", ["", "sideways", "strong;weak"])
def test_modes_that_are_none_are_refused(words):
    with pytest.raises(InputError, match=r"is no way to scale; expected strong, weak, or strong,weak"):
        read_modes(words)


def test_words_are_read_in_any_order():
    assert read_ranks("4, 1,2,2") == (1, 2, 4) and read_modes("weak,strong") == ("strong", "weak")


def test_more_ranks_than_there_are_places_are_refused_with_what_fits(job, tmp_path):
    with pytest.raises(InputError, match=r"--ranks 4 needs a core .* this machine has 2 cores; --ranks 1,2 fits$"):
        refuse_too_many((1, 2, 4), 2, "this machine has 2 cores")
    with pytest.raises(InputError, match=r"; at most 2 ranks would fit$"):
        refuse_too_many((4,), 2, "this machine has 2 GPUs")
    with pytest.raises(InputError, match=r"--ranks 4096 needs .* this machine has"):
        bench_scaling(read_job(job, ["batch.queries=8192"]), plan(ranks=(1, 4096)), tmp_path / "out", None, None)
    assert not (tmp_path / "out").exists()


def test_ranks_fill_nodes():
    assert [nodes_of(ranks, 8) for ranks in (1, 4, 8, 16)] == [1, 1, 1, 2]
    with pytest.raises(InputError, match="--ranks 12 cannot be divided by 8 ranks on a node; the nearest that can are 8 and 16;"):
        nodes_of(12, 8)


@pytest.mark.parametrize(
    ("ranks", "gpus", "says"),
    [
        ((4, 8, 16), 4, "--ranks 16 needs 4 nodes of 16 cores and 4 GPUs, and partition gpu has 2 such; --ranks 4,8 fits"),
        ((6,), 6, "--ranks 6 needs 1 node of 24 cores and 6 GPUs, and partition gpu has 0 such; set --gpus-per-node"),
        ((4, 8), 0, "--ranks 8 needs 4 nodes of 8 cores, and partition gpu has 3 such; --ranks 4 fits"),
    ],
)
def test_nodes_that_a_partition_lacks_are_refused_with_what_fits(job, monkeypatch, ranks, gpus, says):
    # What sinfo answers; tests/slurm asks a real one.
    lines = ["n1|64|gpu:h100:4(S:0-1)|gpu*", "n2|64|gpu:4|gpu*", "n3|64|(null)|gpu*", "n4|4|(null)|gpu*", "n5|64|gpu:8|big"]
    monkeypatch.setattr(trial_jobs, "check_slurm", lambda partition: None)
    monkeypatch.setattr(trial_jobs, "ask_slurm", lambda *words: "\n".join(lines))
    with pytest.raises(InputError, match=says):
        refuse_missing_nodes(ranks, read_job(job, []), dataclasses.replace(ALLOCATION, gpus_per_node=gpus, cpus_per_rank=4))


def keep(folder, trial, **more):
    TrialFolder(folder).keep(trial, CONDITIONS, found(trial.ranks, trial.queries, 0.1, **more))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"commit": "fedcba9876543210"}, "with commit 0123456789ab, and .* with commit fedcba987654, which no table compares"),
        ({"is_modified": True}, "with commit 0123456789ab, and .* with commit 0123456789ab and changes to it"),
        ({"device": "another"}, "on a processor, and .* on another, which no table compares; set --out to another folder"),
        ({"torch": "3.0"}, "with torch 2.0, and .* with torch 3.0"),
        ({"threads": 4}, "with threads 1, and .* with threads 4"),
    ],
)
def test_what_was_measured_elsewhere_is_not_kept_and_not_drawn(tmp_path, more, says):
    keep(tmp_path, Trial(1, 8, 1))
    with pytest.raises(InputError, match=says):
        keep(tmp_path, Trial(2, 8, 1), **more)
    assert len(list(tmp_path.glob("trials/*"))) == 1
    keep(tmp_path / "other", Trial(2, 8, 1), **more)
    os.replace(tmp_path / "other/trials/ranks-2-queries-8-round-1.json", tmp_path / "trials/ranks-2-queries-8-round-1.json")
    with pytest.raises(InputError, match=says.replace("set --out to another folder", "delete one of them")):
        TrialFolder(tmp_path)


def test_a_file_that_is_no_trial_is_named(tmp_path):
    keep(tmp_path, Trial(1, 8, 1))
    (tmp_path / "trials" / "ranks-1-queries-8-round-1.json").write_text("{")
    with pytest.raises(InputError, match=r"ranks-1-queries-8-round-1.json is no trial .* delete it, and it is measured again"):
        TrialFolder(tmp_path)


def test_another_job_or_other_texts_in_the_same_folder_are_refused(job, tmp_path, started):
    out = tmp_path / "out"
    bench_scaling(read_job(job, []), plan(ranks=(1,)), out, None, None)
    with pytest.raises(
        InputError, match=r"measured with optim.lr=\S+, and this job has 0.5; set --out to another folder, or delete"
    ):
        bench_scaling(read_job(job, ["optim.lr=0.5"]), plan(ranks=(1,)), out, None, None)
    with pytest.raises(InputError, match="on data job, and this would be on data made-64"):
        bench_scaling(read_job(job, []), plan(ranks=(1,), data="made-64"), out, None, None)
    bench_scaling(read_job(job, ["run.folder=elsewhere", "data.num_proc=3"]), plan(ranks=(1,)), out, None, None)
    assert started() == ["1 8"]


def test_a_size_that_dies_does_not_end_the_others(job, tmp_path, started, monkeypatch):
    monkeypatch.setenv("NEGPOOL_TEST_DEAD", "2")
    result = bench_scaling(read_job(job, []), plan(modes=("strong",), rounds=2), tmp_path / "out", None, None)
    assert started() == ["1 8", "2 8", "1 8"], "not tried again in the second round"
    assert [(each["ranks"], each["round"]) for each in result["failed"]] == [(2, 1)]
    assert "this size dies" in result["failed"][0]["why"]
    assert [row["ranks"] for row in result["sizes"]["strong"]] == [1]
    assert "Not measured: 2 ranks, 8 queries: [rank0]: this size dies" in as_markdown(scaling_parts(result))


def test_an_interrupted_benchmark_keeps_what_it_has_and_goes_on(job, tmp_path, started):
    words = f"bench scaling {job} --ranks 1,2 --mode weak --rounds 1 --out {tmp_path}/out --json".split()
    command = [sys.executable, "-c", COMMAND, *words]
    slow = os.environ | {"NEGPOOL_TEST_SLOW": "2"}
    first = subprocess.Popen(command, env=slow, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (tmp_path / "trials.txt").exists() and started() == ["1 8", "2 16"], "the second trial", 180)
    except AssertionError:
        first.kill()
        raise AssertionError(first.communicate()) from None
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=120)
    assert first.returncode == 75 and said[0] == "", said
    assert "1 trial kept in" in said[1] and "1 to measure; the same command goes on from there" in said[1]
    assert "Traceback" not in said[1] and "stopped by Ctrl-C" in said[1]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert started()[2:] == ["2 16"]
    result = json.loads(again.stdout)
    assert [row["rounds"] for row in result["sizes"]["weak"]] == [1, 1]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"scaling.json", "scaling.md", "efficiency.png", "phases.png", "bandwidth.png", "job.toml"} <= files
    assert json.loads((tmp_path / "out" / "scaling.json").read_text()) == result


def test_options_of_slurm_have_no_effect_on_one_machine(job):
    with pytest.raises(InputError, match="--time has no effect on this machine; add --slurm, or leave it out"):
        app(["bench", "scaling", str(job), "--time", "30"], standalone_mode=False)


def rows_of(seconds: dict[tuple[int, int], list[float]], sizes, fabric=None, nodes=1):
    """Return the rows of trials. seconds: of each round, by ranks and queries."""
    results = {
        Trial(ranks, queries, number + 1): found(ranks, queries, step_s, nodes=1 if ranks == 1 else nodes)
        for (ranks, queries), rounds in seconds.items()
        for number, step_s in enumerate(rounds)
    }
    return summary(results, sizes, fabric)


def test_efficiency_is_against_the_smallest_size_of_the_same_round():
    strong = rows_of({(1, 8): [1.0, 2.0, 4.0], (2, 8): [0.5, 1.25, 2.5]}, {"strong": [(1, 8), (2, 8)]})["strong"]
    assert strong[0]["efficiency"] == 1 and strong[1]["efficiency"] == pytest.approx(0.8)  # of 1.0, 0.8 and 0.8
    assert strong[1]["efficiency_of_rounds"] == pytest.approx([0.8, 1.0])
    weak = rows_of({(1, 8): [1.0], (4, 32): [1.25]}, {"weak": [(1, 8), (4, 32)]})["weak"]
    assert weak[1]["efficiency"] == pytest.approx(0.8)
    assert weak[1]["tokens_per_s"] == pytest.approx(3200 / 1.25)
    assert weak[1]["share_of_matmul_rate"] == pytest.approx(32e9 / 4 / 1e11 / 1.25)
    assert weak[1]["peak_gib"] == 4.5 and weak[1]["slowest_over_fastest"] == pytest.approx(1 / 0.97)


def test_what_the_machine_itself_loses_is_told_by_a_bare_product():
    slower = found(2, 16, 1.25) | {"matmul_flops_per_s": 9e10}
    rows = summary({Trial(1, 8, 1): found(1, 8, 1.0), Trial(2, 16, 1): slower}, {"weak": [(1, 8), (2, 16)]}, None)["weak"]
    assert [row["efficiency"] for row in rows] == [1, 0.8] and [row["matmul_efficiency"] for row in rows] == [1, 0.9]


def test_rounds_that_only_one_size_has_are_compared_by_their_medians():
    rows = rows_of({(1, 8): [1.0], (2, 16): [1.0, 2.0]}, {"weak": [(1, 8), (2, 16)]})["weak"]
    assert rows[1]["efficiency"] == 1 and rows[1]["step_s"] == 1.5


def test_shares_of_phases_add_up_without_what_is_hidden():
    (row,) = rows_of({(2, 8): [1.2]}, {"strong": [(2, 8)]})["strong"]
    shares = {name: phase["share"] for name, phase in row["phases"].items()}
    assert sum(share for name, share in shares.items() if name != "parameters_hidden") == pytest.approx(1)
    assert shares["parameters_hidden"] == pytest.approx(0.25)


def test_phases_and_bytes_that_no_one_knows_are_said_to_be_unknown(result):
    unknown = found(2, 16, 1.0)
    unknown["phases"] |= {"parameters": None, "parameters_hidden": None}
    unknown["bytes"] |= {"formula": None, "interface": None}
    rows = summary({Trial(1, 8, 1): found(1, 8, 1.0), Trial(2, 16, 1): unknown}, {"weak": [(1, 8), (2, 16)]}, None)
    said = as_markdown(scaling_parts(result | {"sizes": rows}))
    assert "| parameters, exposed | 83.33 (8.3%) | not known |" in said and "| 2 ranks | not known | 0.9537 |  |  |  |  |" in said
    assert pictures({"sizes": rows})["phases"]


def test_peaks_are_those_of_the_links_that_messages_cross():
    def constants(rate):
        return {name: SimpleNamespace(bytes_per_s=rate) for name in ("all_gather", "all_reduce")}

    fabric, sizes = SimpleNamespace(inside=constants(3e11), between=constants(5e10)), {"weak": [(1, 8), (2, 16)]}
    for nodes, peak in ((1, 3e11), (2, 5e10)):
        rows = rows_of({(1, 8): [1.0], (2, 16): [1.0]}, sizes, fabric, nodes)["weak"]
        assert {call["collective"]: call["peak_bytes_per_s"] for call in rows[1]["bus"]} == {
            "all_gather": peak,
            "all_reduce": peak,
            "reduce_scatter": None,
        }


@pytest.fixture
def result():
    seconds = {(r, q): [t, t * 1.1] for r, q, t in [(1, 8, 1), (2, 8, 0.55), (4, 8, 0.3), (2, 16, 1.05), (4, 32, 1.1)]}
    sizes = {"strong": [(1, 8), (2, 8), (4, 8)], "weak": [(1, 8), (2, 16), (4, 32)]}
    fabric = SimpleNamespace(inside={"all_gather": SimpleNamespace(bytes_per_s=4e9)}, between={})
    about = {"rounds": 2, "fabric": "a bus", "warm_up": 10, "steps": 3, "data": "job", "failed": []}
    return found(1, 8, 1.0) | about | {"sizes": rows_of(seconds, sizes, fabric)}


def test_tables_have_every_figure(result):
    sheets = {part.title: part for part in scaling_parts(result) if isinstance(part, Sheet)}
    sizes = next(sheet for title, sheet in sheets.items() if title.startswith("weak scaling: 8 queries a rank"))
    assert sizes.rows[2][:4] == ("4 ranks", "1", "8", "1155") and sizes.numbers("efficiency") == [1.0, 0.952, 0.909]
    phases = sheets["strong scaling: milliseconds of a step, mean of the ranks (share of the step)"]
    assert phases.columns == ("", "1 rank", "2 ranks", "4 ranks")
    names = [row[0] for row in phases.rows]
    assert len(names) == 14 and "parameters, hidden" in names and names[-1] == "all messages, exposed"
    sent = sheets["weak scaling: MiB that a rank sends in a step"]
    assert sent.rows[1] == ("2 ranks", "0.9537", "0.9537", "+0.0%", "0.9727", "+2.0%", "lo")
    bus = sheets["weak scaling: bus bandwidth of the messages of a step, against a bus"]
    assert bus.rows[0] == ("2 ranks, all-gather", "256 KiB", "0.1311", "0.4", "4", "10%")
    assert all(len(row) == len(sheet.columns) for sheet in sheets.values() for row in sheet.rows)


def test_pictures_are_not_blank(result, tmp_path):
    drawn = pictures(result)
    assert set(drawn) == {"efficiency", "phases", "bandwidth"}
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")
        image = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3].mean(axis=-1)
        assert image.std() > 0.05, f"{name} is blank"
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_one_rank_alone_has_no_picture_of_messages(result):
    assert set(pictures(result | {"sizes": rows_of({(1, 8): [1.0]}, {"weak": [(1, 8)]})})) == {"efficiency", "phases"}
