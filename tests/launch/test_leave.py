"""Ctrl-C in the first seconds of real processes, and twice: one line, no traceback, nothing left running."""

import signal
import subprocess
import sys

import psutil
import pytest
import typer

from launch.__main__ import main
from tests.tiny import write_tiny_dataset

JOB = '[data]\npath = "{root}/data"\n[model]\nname = "{root}/model"\n[run]\nfolder = "{root}/run"\n'


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("leave")
    write_tiny_dataset(root / "data")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    (root / "job.toml").write_text(JOB.format(root=root))
    return root / "job.toml"


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["run"], "typer"),  # the command line itself
        (["run"], "pydantic_core"),
        (["train"], "torch.torch_version"),  # in the middle of torch
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(job, words, module):
    # What Python tells of its imports shows when to press.
    command = [sys.executable, "-X", "importtime", "-m", "negpool", *words, str(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        if not line.startswith("import time:"):
            said.append(line)
        elif line.split("|")[-1].strip() == module:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 75
    assert [line for line in said if "reading the data" not in line] == ["negpool: stopped by Ctrl-C\n"]


# A command at work: it has a child, and takes its time to clean up.
WORK = """
import subprocess, sys, time
from launch.leave import ctrl_c_in_one_line
from launch.local import die_with_parent
with ctrl_c_in_one_line():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], preexec_fn=die_with_parent)
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    finally:
        print("cleaning up", flush=True)
        time.sleep({seconds})
        child.kill()
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_cleans_up_and_a_second_one_leaves_at_once(presses):
    work = WORK.format(seconds=0 if presses == 1 else 600)
    process = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    if presses == 2:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (75, "", "negpool: stopped by Ctrl-C\n")
    child.wait()  # it ends with its parent


def test_a_process_that_was_told_to_ignore_ctrl_c_ignores_it():
    work = "import signal; from launch.leave import ctrl_c_in_one_line as block\nwith block():\n    print(signal.getsignal(2))"
    ran = subprocess.run(["sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, work], capture_output=True, text=True)
    assert ran.stdout == f"{signal.SIG_IGN!s}\n"


def test_ctrl_c_in_a_command_at_work_is_not_made_an_exit_code_by_the_parser(monkeypatch):
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.commands.app", app)
    monkeypatch.setattr(sys, "argv", ["negpool"])
    with pytest.raises(KeyboardInterrupt):
        main()
