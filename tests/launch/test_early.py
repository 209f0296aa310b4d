"""A job that cannot run is refused before torch is loaded, by every command that takes one."""

import re
import subprocess
import sys

import pytest

from launch.early import check_early
from launch.jobfile import read_job
from tests.tiny import write_tiny_dataset
from trainer.errors import InputError

HEAVY = ("torch", "transformers", "datasets", "pandas", "faiss", "accelerate", "mpi4py.MPI")
# Runs one command after another in one process: what one of them imports shows at it and at all that follow.
RUN = f"""
import sys
from launch.__main__ import main
for words in eval(sys.argv[1]):
    sys.argv = ["negpool", *words]
    try:
        main()
    except SystemExit as end:
        print(end.code, *(name for name in {HEAVY} if name in sys.modules), sep=" ")
"""


def test_nothing_heavy_is_imported_for_a_job_that_cannot_be_used(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text('[data]\npath = "no/such/folder"\n')
    commands = [["run"], ["train"], ["mine"], ["mine", "--show", "3"], ["check"], ["submit"], ["data", "prepare"]]
    words = [[*command, "nosuch.toml"] for command in commands]
    words += [[*command, str(bad), "optim.le=1"] for command in commands]
    words += [[*command, str(bad)] for command in commands if "--show" not in command]
    words += [["settings", "optimm"], ["--help"], ["settings", "--json"], ["run", "--help"]]
    ran = subprocess.run([sys.executable, "-c", RUN, repr(words)], capture_output=True, text=True, cwd=tmp_path)
    codes = [line for line in ran.stdout.splitlines() if line[:1].isdigit()]
    assert codes == [*["2"] * (len(words) - 3), "0", "0", "0"], ran.stdout + ran.stderr
    assert "trainer: negpool train JOB.toml" in ran.stdout and "miner: negpool mine JOB.toml" in ran.stdout, "the two shells"
    told = [line for line in ran.stderr.splitlines() if line.startswith("negpool: ")]
    assert len(told) == len(words) - 3 and "Traceback" not in ran.stderr
    assert sum("there is no job file nosuch.toml" in line for line in told) == 7
    assert sum("unknown key optim.le; did you mean lr?" in line for line in told) == 7
    assert sum("there is no data set in no/such/folder" in line for line in told) == 6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.objective=info_nc"], "loss.objective: there is no objective 'info_nc'; did you mean 'info_nce'?"),
        (["loss.parameters.hardnes=9"], "the objective info_nce has no parameter 'hardnes'; did you mean 'hardness'?"),
        (["loss.objective=dclw", "loss.parameters.sigma=0"], "has sigma=0; expected a number from 0.01 to 10 (0.5 in the paper)"),
        (["loss.parameters={focal=true}"], "has focal=True; expected a number from 0 to 10"),
        (["loss.parameters.positives=all"], "has positives='all'; expected one of own, mean, sum, supcon"),
        (["loss.objective=nosuch:thing"], "the module nosuch cannot be imported"),
        (["loss.parameters.in_batch=false", "loss.symmetric=true"], "own passages alone, which has one direction"),
        (["loss.objective=math:pi"], "'math:pi' is a float; expected a class, or a function that returns an objective"),
        (["loss.objective=math:sqr"], "the module math has no 'sqr'"),
        (["loss.objective=dcl", "loss.parameters.focal=1"], "weighs by a probability, which this loss has none of"),
        (["loss.partition=joint"], "needs loss.symmetric=true and an objective that has one; found symmetric=false"),
        (["loss.objective=alignment_uniformity"], "is about texts of one side; set loss.same_side=true"),
        (
            ["loss.objective=angle", "loss.symmetric=true"],
            "own passages alone, which has one direction; set loss.symmetric=false",
        ),
        (
            ["loss.objective=cosent", "loss.max_score=0.7"],
            "looks at no negatives; take loss.max_score away",
        ),
        (["loss.max_scor=0.7"], "unknown key loss.max_scor; did you mean max_score?"),
    ],
)
def test_a_loss_that_has_no_meaning_is_refused_when_the_job_is_read(overrides, words):
    with pytest.raises(InputError, match=re.escape(words)):
        read_job(None, overrides)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    root = tmp_path_factory.mktemp("early")
    (write_tiny_dataset(root / "data") / "qrels" / "dev.tsv").unlink()
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    return [f"data.path={root / 'data'}", f"model.name={root / 'model'}", f"run.folder={root / 'run'}"]


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            ["eval.every_steps=5"],
            r"eval\.dev_split='dev' is no split of .*data, which has test, train; set it to one of them, or leave",
        ),
        (["eval.every_steps=5", "eval.dev_split=tests"], r"eval\.dev_split='tests' is no split of .*data, which has test, train"),
        (["data.train_split=trian"], r"data\.train_split='trian' is no split of .*data, which has test, train; set it to one of"),
        (["model.name=no/such/model"], r"model\.name='no/such/model' is not a model that can be loaded"),
        (
            ["eval.every_steps=20", "eval.dev_split=test", "stop.patience=1", "optim.steps=20"],
            r"section stop decides by evaluations on dev, every 20 steps, and the run has 20; set eval\.every_steps below 20",
        ),
        (
            ["negatives.schedule=[{checkpoint=200, step=300}]", "optim.steps=300"],
            r"negatives\.schedule has a swap at step 300, and the run ends with step 300; take it out, or set optim\.steps above",
        ),
        (["rerank.model=no/such/model"], r"rerank\.model='no/such/model' is not a model that can be loaded"),
        (["sources.a.path=no/such/a", "sources.b.path=no/b"], "there is no data set in no/such/a"),
    ],
)
def test_what_files_and_names_tell_is_said_at_once(names, overrides, sentence):
    data = [] if any(override.startswith("sources.") for override in overrides) else names[:1]
    with pytest.raises(InputError, match=sentence):
        check_early(read_job(None, [*data, *names[1:], *overrides]))


def test_a_job_that_can_run_passes(names):
    check_early(read_job(None, [*names, "eval.every_steps=5", "eval.dev_split=test", "stop.patience=2"]))


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("parallel.backend=zero2", r'parallel\.backend="zero2" needs DeepSpeed, which is not installed; run: pip install'),
        ("model.lora_rank=4", r"model\.lora_rank=4 needs PEFT, which is not installed; run: pip install 'negpool\[lora\]'"),
        ("index.factory=Flat", r"index\.factory='Flat' needs FAISS, which is not installed"),
    ],
)
def test_a_package_that_a_setting_needs_is_asked_for(names, monkeypatch, override, sentence):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=sentence):
        check_early(read_job(None, [*names, override]))
