"""A real notebook kernel, as Jupyter starts it: a progress bar, one sentence for an error, and the stop button."""

import time

import pytest
from jupyter_client.manager import start_new_kernel

from tests.tiny import write_own_modules, write_tiny_dataset, write_tiny_encoder

WAIT_S = 240
TRAIN = """
negpool.train(
    model="encoder", data="data", run={"folder": "run"}, batch={"queries": 8}, optim={"steps": 100000},
    launch={"train_ranks": 1},
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a person's own modules of our names."""
    folder = write_own_modules(tmp_path_factory.mktemp("notebook") / "own")
    write_tiny_dataset(folder / "data")
    write_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def cell(kernel, code, meanwhile=lambda: False):
    """Run a cell and return what a person sees of it: texts, what is displayed, and the error's lines.

    meanwhile: called again and again until it has done what it is for, and says so.
    """
    _, client = kernel
    asked = client.execute(code)
    texts, displayed, error, is_done = [], [], [], False
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        is_done = is_done or meanwhile()
        try:
            message = client.get_iopub_msg(timeout=0.2)
        except Exception as empty:
            assert type(empty).__name__ == "Empty"
            continue
        if message["parent_header"].get("msg_id") != asked:
            continue
        kind, content = message["msg_type"], message["content"]
        texts += [content["text"]] if kind == "stream" else []
        displayed += [content["data"]] if kind in ("display_data", "execute_result") else []
        error = content["traceback"] if kind == "error" else error
        if kind == "status" and content["execution_state"] == "idle":
            return "".join(texts), displayed, error
    pytest.fail("the cell did not end")


def test_an_import_leaves_the_kernel_as_it_is(kernel, folder):
    look = "(list(sys.path), dict(os.environ))"
    code = f"import sys, os; before = {look}; import negpool; print(before == {look})"
    assert cell(kernel, code)[0].strip() == "True"


def test_an_error_is_one_line(kernel):
    _, _, error = cell(kernel, "import negpool; negpool.evaluate('nosuch', 'data', optim={'lr': 1})")
    (line,) = error
    assert line.startswith("InputError: optim.lr has no effect")


def test_the_stop_button_stops_both_sides_and_says_how_to_go_on(kernel, folder):
    manager, _ = kernel

    def stop_when_it_has_begun():
        has_begun = (folder / "run" / "logs" / "miner.log").exists()
        if has_begun:
            manager.interrupt_kernel()
        return has_begun

    texts, displayed, error = cell(kernel, "import negpool\n" + TRAIN, stop_when_it_has_begun)
    (line,) = error
    assert line.startswith("RunStopped: stopped at step ") and "make the same call again" in line
    assert "negpool.train(job='run/job.toml')" in line
    assert any("application/vnd.jupyter.widget-view+json" in data for data in displayed), "the bars are a widget"
    shown = " ".join(data.get("text/plain", "") for data in displayed)
    assert "training queries" in shown and "Traceback" not in texts + shown
    alive, _, _ = cell(kernel, "import psutil; print([child.cmdline() for child in psutil.Process().children(recursive=True)])")
    assert "negpool" not in alive
