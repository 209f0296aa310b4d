"""A strict type checker reads the types of the public names from what is installed, and finds mistakes in a person's script."""

import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
from pathlib import Path

import negpool
from datasets import Dataset, DatasetDict

result = negpool.train(model="m", data=Path("d"), optim={"lr": 2e-5}, evaluator=lambda model: 1.0)
reveal_type(result)  # TrainResult
reveal_type(result.metrics)  # dict[str, dict[str, float]]
reveal_type(result.model())  # SentenceTransformer
reveal_type(negpool.evaluate(result.model(), [{"anchor": "a", "positive": "b"}]))  # dict[str, float]
reveal_type(negpool.encode("m", ["a"], side="query").dtype)  # dtype[floating[_32Bit]]
reveal_type(negpool.mine_negatives("bm25", Dataset(), num_negatives=3).to_dataset())  # Dataset
reveal_type(negpool.load(Path("x")))  # SentenceTransformer
reveal_type(negpool.Job("m", DatasetDict()).train.data.train_split)  # str
reveal_type(negpool.Job.read("j.toml"))  # Job
reveal_type(negpool.check(job="j.toml").ok)  # bool
negpool.evaluate("m", ({"q": "a"}, {"d": "b"}, {"q": {"d": 1}}))
negpool.evaluate("m", {"train": [{"a": "b"}]}, query_prefix="query: ")
try:
    negpool.train(job=negpool.Job(), mine=False)
except negpool.NegpoolError as error:
    reveal_type(error)  # NegpoolError
negpool.encode("m", ["a"], side="document")  # error: arg-type
negpool.evaluate(3, "d")  # error: arg-type
negpool.trian("m", "d")  # error: attr-defined
negpool.evaluate("m", "d", split=1)  # error: arg-type
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return an environment's packages: ours as they are installed, numpy, and of the others' types only names."""
    folder = tmp_path_factory.mktemp("types")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    build = ["-q", "egg_info", f"--egg-base={folder}", "build_py", f"--build-lib={site}"]
    subprocess.run([sys.executable, "-c", "from setuptools import setup; setup()", *build], check=True, cwd=ROOT)
    (site / "numpy").symlink_to(Path(numpy.__file__).parent)
    others = {"sentence_transformers": "class SentenceTransformer: ...", "datasets": "class Dataset: ..."}
    others["datasets"] += "\nclass DatasetDict(dict[str, Dataset]): ..."
    for name, code in others.items():
        (site / name).mkdir()
        (site / name / "py.typed").touch()
        (site / name / "__init__.py").write_text(code + "\n")
    return site


def test_a_strict_type_checker_knows_every_type(site, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    python = site.parents[2] / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", f"--python-executable={python}", "--cache-dir=cache", "script.py"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    said = {int(number): text for number, text in re.findall(r"^script\.py:(\d+): (.*)$", found, flags=re.MULTILINE)}
    wanted = {number: line.split("  # ")[1] for number, line in enumerate(SCRIPT.splitlines(), 1) if "  # " in line}
    assert said.keys() == wanted.keys(), found
    for number, what in wanted.items():
        if what.startswith("error: "):
            assert said[number].startswith("error: ") and said[number].endswith(f"[{what.removeprefix('error: ')}]")
        else:
            assert re.sub(r"\w+\.(?=\w)", "", said[number]) == f'note: Revealed type is "{what}"'


def test_what_is_installed_says_that_it_is_typed(site):
    assert all((site / name / "py.typed").is_file() for name in ("launch", "trainer", "mining", "gradcache"))
