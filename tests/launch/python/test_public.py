"""What an import brings, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path

import launch.python.public
import negpool
from tests.tiny import write_own_modules

ROOT = Path(__file__).parents[3]
LOOK = """
import json, os, sys
before = list(sys.path), dict(os.environ)
import negpool
same, loaded = before == (list(sys.path), dict(os.environ)), set(sys.modules)
job = negpool.Job(optim={"lr": 1e-3})
has_torch = "torch" in sys.modules
import gradcache, trainer
print(json.dumps({
    "same": same and before == (list(sys.path), dict(os.environ)),
    "heavy": sorted(loaded & {"torch", "transformers", "datasets", "pydantic", "rich", "numpy", "launch", "trainer"}),
    "torch": has_torch,
    "trainer": trainer.__file__,
    "step": gradcache.cached_step.__module__,
    "first": sys.path[0],
}))
"""
FOREIGN = """
try:
    import launch
except RuntimeError:
    pass
import types, sys
sys.modules["launch"] = types.ModuleType("launch")
import negpool
negpool.train
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_an_import_is_light_and_changes_nothing_and_takes_our_packages(tmp_path):
    """As in a notebook, whose working folder is first on the path and has modules of our names. A job is read without torch."""
    found = run(LOOK, write_own_modules(tmp_path / "own"))
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    ours = {"trainer": str(ROOT / "trainer" / "__init__.py"), "step": "gradcache.step"}
    assert told == {"same": True, "heavy": [], "torch": False, "first": "", **ours}


def test_a_module_of_the_persons_own_that_was_imported_first_is_named(tmp_path):
    found = run(FOREIGN, write_own_modules(tmp_path / "own"))
    assert found.returncode == 1
    assert "ImportError: None was imported as 'launch', which is a package of negpool's" in found.stderr


def test_gradcache_comes_by_itself():
    code = "import sys, gradcache; print(sorted({'launch', 'trainer', 'mining', 'negpool', 'transformers'} & set(sys.modules)))"
    assert run(code, ROOT).stdout.strip() == "[]"


def test_the_names_are_all_there():
    public = {name for name in vars(launch.python.public) if not name.startswith("_")}
    assert set(negpool.NAMES) == public == set(dir(negpool)) == set(negpool.__all__)
    for name in public:
        assert getattr(negpool, name).__doc__, name
    assert not hasattr(negpool, "trian")


def test_one_class_catches_all_errors():
    errors = [getattr(negpool, name) for name in ("InputError", "RunInUse", "MustNotGoOn", "MachineFailed", "TrainerDied")]
    assert all(issubclass(error, negpool.NegpoolError) for error in errors)
    assert issubclass(negpool.RunStopped, KeyboardInterrupt) and not issubclass(negpool.RunStopped, negpool.NegpoolError)
