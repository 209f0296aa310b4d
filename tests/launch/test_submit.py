"""What `negpool submit` makes of a job and a size, without a cluster; tests/slurm has the real one."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch import submit as module
from launch.jobfile import read_job
from launch.submit import Size, batch_commands, describe, seconds_of, submit
from tests.tiny import write_tiny_encoder
from trainer.errors import InputError

ROOT = Path(__file__).parent.parent.parent
DEFAULTS = {
    "nodes": 4,
    "gpus_per_node": 8,
    "miner_nodes": 1,
    "cpus_per_rank": 6,
    "partition": "gpu",
    "time": "1-0",
    "save_seconds": 120,
    "max_restarts": 10,
    "together": False,
    "options": ("--account=me",),
}


def size(**values) -> Size:
    return Size(**(DEFAULTS | values))


@pytest.fixture
def jobs(tmp_path):
    (tmp_path / "job.toml").write_text("[launch]\ntrain_ranks = 3\nmine_ranks = 2\n")
    write_tiny_encoder(tmp_path / "encoder")
    return read_job(tmp_path / "job.toml", [f"run.folder={tmp_path}/run", f"model.name={tmp_path}/encoder"])


def test_trainers_and_miner_get_what_they_were_asked_for(jobs):
    commands = batch_commands(jobs, size(), "77")
    for words in commands.values():
        assert {"--gpus-per-node=8", "--partition=gpu", "--time=1-0", "--signal=USR1@120", "--account=me"} <= set(words)
    assert {"--nodes=4", "--cpus-per-task=48"} <= set(commands["train"]), "one launcher on each node, for eight ranks"
    wanted = {"--nodes=1", "--ntasks-per-node=8", "--cpus-per-task=6", "--dependency=after:77"}
    assert wanted <= set(commands["mine"]), "a task for each rank"
    assert commands["mine"][-2:] == [f"{jobs.train.run.folder}/job.toml", "77"]


def test_names_are_left_as_they_are_and_the_miner_gets_its_number(jobs, tmp_path, monkeypatch):
    log, note = tmp_path / "words", "sbatch: lua: TRAIN jobs are billed"  # a site may have something to tell everybody
    sbatch = f'for word; do printf "%s\\0" "$word" >>{log}; done; printf "\\n\\0" >>{log}; echo {note} >&2; echo "7;c1"'
    put_in_path(tmp_path, monkeypatch, sbatch=sbatch, sinfo="echo TRAIN", srun="echo '  pmix'", squeue="exit 1")
    options = ("--account=TRAINING_DL", "--comment=a 'b', $c=d\n%j", "--export=ALL,TRAIN=1")
    found = submit(jobs, size(partition="TRAIN", options=options), dry_run=False)
    *both, rest = log.read_text().split("\n\0")
    train, mine = (words.split("\0")[:-1] for words in both)
    assert found["jobs"] == {"train": 7, "mine": 7} and rest == ""
    for words in (train, mine):
        assert {"--partition=TRAIN", *options} <= set(words)
    assert "--dependency=after:7" in mine and mine[-1] == "7" and not any("depend" in word for word in train)
    for side, words in (("train", train), ("mine", mine)):
        printed = shlex.split(found["commands"][side])
        assert printed[printed.index("sbatch") + 1 :] == words, "what is printed can be pasted"


def test_a_folder_may_have_any_name_that_slurm_can_take(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("-50%j of 'it', a=b")
    changed = replace(jobs, train=replace(jobs.train, run=replace(jobs.train.run, folder=folder)))
    commands = batch_commands(changed, size(), "7")
    assert f"--output={tmp_path}/-50%%j of 'it', a=b/logs/slurm-mine-%j.out" in commands["mine"]
    assert commands["mine"][-2:] == [f"{tmp_path}/{folder}/job.toml", "7"]
    numbered = {"run": str(tmp_path / folder), "jobs": {"train": 7}, "commands": {}}
    follow = describe(numbered).splitlines()[1].split("tail -F ")[1]
    (tmp_path / folder / "logs").mkdir(parents=True)
    (tmp_path / folder / "logs" / "slurm-train-7.out").write_text("found")
    assert subprocess.run(["bash", "-c", f"cat {follow}"], capture_output=True, text=True).stdout == "found"
    backslash = replace(jobs, train=replace(jobs.train, run=replace(jobs.train.run, folder=Path("a\\b"))))
    with pytest.raises(InputError, match="has a backslash, and Slurm numbers no logs in such a folder"):
        submit(backslash, size(), dry_run=True)


def test_a_dry_run_shows_a_name_where_there_is_no_number_yet(jobs, tmp_path, monkeypatch):
    put_in_path(tmp_path, monkeypatch, sbatch='echo "$*" >&2', sinfo="echo gpu", srun="echo '  pmix'")
    found = submit(jobs, size(), dry_run=True)
    assert "--dependency=after:TRAIN" in found["commands"]["mine"] and "TRAIN" not in found["slurm_says"]["mine"]
    assert "TRAIN stands for the number of the trainers' job." in describe(found)


def test_words_that_would_lose_what_the_jobs_need_are_refused(monkeypatch):
    with pytest.raises(InputError, match="--sbatch=account=me is no option of sbatch; expected one word with two dashes"):
        size(options=("account=me",))
    with pytest.raises(InputError, match="--export=A,B keeps this environment from the jobs, which need it; set --sbatch=--exp"):
        size(options=("--export=ALL", "--export=A,B"))
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    with pytest.raises(InputError, match="SBATCH_EXPORT=NONE keeps this environment"):
        size()
    size(options=("--export=ALL,A=1",))


def test_nodes_without_gpus_work_with_the_ranks_that_the_job_names(jobs):
    commands = batch_commands(jobs, size(gpus_per_node=0))
    assert not any(word.startswith("--gpus") for words in commands.values() for word in words)
    assert "--cpus-per-task=18" in commands["train"] and "--ntasks-per-node=2" in commands["mine"]


def test_the_miner_may_be_left_out_or_be_part_of_one_job(jobs):
    assert batch_commands(jobs, size(miner_nodes=0)).keys() == {"train"}
    (words,) = batch_commands(jobs, size(together=True)).values()
    colon = words.index(":")
    assert "--nodes=4" in words[:colon] and "--nodes=1" in words[colon:]


def test_every_batch_file_is_valid_and_fits_on_a_screen():
    for file in (ROOT / "slurm").glob("*.sbatch"):
        subprocess.run(["bash", "-n", file], check=True)
        assert len(file.read_text().splitlines()) <= 45, file
        assert all(len(line) <= 140 for line in file.read_text().splitlines()), file


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-0:0:5", 86405), ("infinite", None)],
)
def test_time_limits_are_read_as_slurm_reads_them(limit, seconds):
    assert seconds_of(limit) == seconds


def test_a_time_limit_without_room_for_a_checkpoint_is_refused():
    with pytest.raises(InputError, match="--time 2 is over before a checkpoint can be saved: the signal to save comes 120 s"):
        size(time="2")
    with pytest.raises(InputError, match="--time tomorrow is no time limit"):
        size(time="tomorrow")
    with pytest.raises(InputError, match="or up to 60 s earlier"):
        size(time="3")
    size(time="4")


def test_a_machine_without_slurm_is_refused(jobs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="there is no sbatch here: this machine is no part of a Slurm cluster"):
        submit(jobs, size(), dry_run=False)


def test_a_dry_run_needs_no_slurm_and_shows_the_scripts(jobs, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = submit(jobs, size(), dry_run=True)
    assert found["slurm_says"] is None and "jobs" not in found
    commands = {name: shlex.split(command) for name, command in found["commands"].items()}
    assert "NEGPOOL_MPI=pmix" in commands["mine"] and {"--nodes=4", "--partition=gpu"} <= set(commands["train"])
    said = describe(found)
    for script in ("train.sbatch", "mine.sbatch"):
        assert (ROOT / "slurm" / script).read_text() in said
    assert said.count("this machine has no Slurm") == 2 and "Not submitted." in said
    both = submit(jobs, size(together=True), dry_run=True)
    assert list(both["scripts"]) == ["train_and_mine.sbatch"]


def put_in_path(folder: Path, monkeypatch, shell: str = "sh", **programs: str) -> None:
    """Stand in for a cluster's commands."""
    (folder / "bin").mkdir()
    for name, script in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/{shell}\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")


def test_a_cluster_that_cannot_start_the_mpi_library_is_refused(jobs, tmp_path, monkeypatch):
    put_in_path(tmp_path, monkeypatch, sbatch="exit 1", sinfo="echo gpu", srun="echo MPI plugin types are...; echo '  pmi2'")
    with pytest.raises(InputError, match=r"mpi4py works with Open MPI .* needs srun --mpi=pmix, and this Slurm has pmi2"):
        submit(jobs, size(), dry_run=True)
    monkeypatch.setattr(module, "ASK_MPI", "import no_such_mpi")
    with pytest.raises(InputError, match=r"no MPI for the miner \(ModuleNotFoundError: No module named 'no_such_mpi'\)"):
        submit(jobs, size(), dry_run=True)


def test_what_slurm_refuses_is_said_and_leaves_half_a_run_nowhere(jobs, tmp_path, monkeypatch):
    refuse_miner = 'case "$*" in *mine.sbatch*) echo "sbatch: error: Batch job submission failed: no" >&2; exit 1;; esac; echo 7'
    log = tmp_path / "cancelled"
    programs = {"sbatch": refuse_miner, "sinfo": "echo gpu", "srun": "echo '  pmix'", "scancel": f"echo $* >{log}"}
    put_in_path(tmp_path, monkeypatch, **programs)
    with pytest.raises(InputError, match="Slurm refuses the job: Batch job submission failed: no; the command was: sbatch"):
        submit(jobs, size(), dry_run=False)
    assert log.read_text() == "7\n"
    assert not (jobs.train.run.folder / "slurm.json").exists()


def test_a_log_folder_that_cannot_be_written_is_refused(jobs, tmp_path, monkeypatch):
    put_in_path(tmp_path, monkeypatch, sbatch="exit 1", sinfo="echo gpu", srun="echo '  pmix'")
    jobs.train.run.folder.mkdir()
    (jobs.train.run.folder / "logs").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*/run/logs: File exists"):
        submit(jobs, size(), dry_run=True)
