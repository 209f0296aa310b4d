"""Job files: overrides, defaults, and one sentence for everything that cannot be used."""

import pytest

from launch.jobfile import CALLED, read_job, refuse_other_job, write_job
from launch.settings import all_settings
from launch.sides import keep_job
from trainer.errors import InputError


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(f'[run]\nfolder = "{tmp_path / "run"}"\n[optim]\nlr = 1e-4\n[chunk]\nkeep_graphs = "all"\n')
    return path


def test_values_come_from_the_file_the_overrides_and_the_defaults(job_file):
    overrides = ["batch.queries=64", "loss.symmetric=true", "data.path=some/folder", "filter.relative_margin=0.1"]
    jobs = read_job(job_file, overrides)
    assert (jobs.train.optim.lr, jobs.train.chunk.keep_graphs) == (1e-4, "all")
    assert (jobs.train.batch.queries, jobs.train.loss.symmetric) == (64, True)
    assert str(jobs.train.data.path) == str(jobs.mine.data.path) == "some/folder"
    assert (jobs.mine.filter.relative_margin, jobs.mine.search.top_k) == (0.1, 200)


def test_what_other_trainers_call_a_setting_leads_to_one_that_is_there():
    known = {f"{name}.{each['key']}" for name, section in all_settings(None).items() for each in section["settings"]}
    assert set(CALLED.values()) <= known


def test_what_is_kept_in_the_run_folder_reads_as_the_same_job(job_file, tmp_path):
    schedule = "negatives.schedule=[{checkpoint=200, step=300}]"
    jobs = read_job(job_file, [schedule, "loss.learn_temperature=true"])
    write_job(tmp_path / "kept.toml", jobs)
    assert read_job(tmp_path / "kept.toml", []) == jobs
    assert jobs.mine.negatives.schedule[0].step == 300


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("optim.wieght_decay=1", r"unknown key optim\.wieght_decay; did you mean weight_decay\?"),
        ("optim.temperature=1", r"unknown key optim\.temperature; it belongs to another section: loss\.temperature$"),
        ("optim.learning_rate=1", r"unknown key optim\.learning_rate; it is called optim\.lr here$"),
        ("optim.num_workers=1", r"unknown key optim\.num_workers; known are lr, "),
        ("train.lr=1", r"unknown section \[train\]; known are run, data, sources, model, batch(, (?!run)\w+)+$"),
        ("filters.top_k=1", r"unknown section \[filters\]; did you mean filter\?"),
        ("optin.lr=1", r"unknown section \[optin\]; did you mean optim\?"),
        ("optim.lr=fast", r"optim\.lr='fast' cannot be used; expected number > 0$"),
        ("batch.queries=1.5", r"batch\.queries=1\.5 cannot be used; expected whole number > 0$"),
        ("batch.queries=-1", r"batch\.queries=-1 cannot be used; expected whole number > 0$"),
        ("optim.lr=nan", r"optim\.lr=nan cannot be used; expected number > 0$"),
        ("optim.warmup_share=1.5", r"optim\.warmup_share=1\.5 cannot be used; expected number >= 0 and <= 1$"),
        ("stop.measure=map", r"""stop\.measure='map' cannot be used; expected "ndcg@10" \| "mrr@10" \| "recall@10" \| """),
        (
            "filter.adaptive_margin=[0.1, -1]",
            r'adaptive_margin=-1 cannot be used; expected \[number >= 0, number >= 0\] \| "off"$',
        ),
        (
            "negatives.schedule=[{checkpoint=1}]",
            r"negatives\.schedule is missing a part; expected \[\{checkpoint = whole number >= 0, ",
        ),
        ("chunk.keep_graphs=some", r"chunk\.keep_graphs.*cannot be used"),
        ("loss.objective=infonce", r"loss\.objective: there is no objective 'infonce'; did you mean 'info_nce'\?"),
        ("chunk.memory_gib=0", r"chunk\.memory_gib=0.* cannot be used; expected number > 0$"),
        ("chunk.tokens=most", r"""chunk\.tokens='most' cannot be used; expected whole number > 0 \| "auto"$"""),
        ("loss.tile_rows=0", r"loss\.tile_rows=0 cannot be used"),
        ('run.trackers=["tensorbord"]', r"""run\.trackers='tensorbord' cannot be used; expected \["tensorboard" \| "wandb" """),
        ('run.trackers=["mlflow", "mlflow"]', r"run\.trackers=.* names one twice"),
        ("loss.widths=[8, 16]", r"loss\.widths are \[8, 16\]; expected one or more that fall"),
        ("loss.widths=[]", r"loss\.widths are \[\]; expected one or more"),
        ("loss.width_weights=[1.0]", r"loss\.width_weights=\[1\.0\] weighs nothing; set loss\.widths"),
        ("precision.encode=fp8", r"precision\.encode='fp8' cannot be used"),
        ("parallel.backend=zero4", r"parallel\.backend='zero4' cannot be used"),
        ("parallel.reduce=chunk", r'parallel\.reduce="chunk" saves nothing with parallel\.backend="ddp"'),
        ("parallel.offload=true", r'parallel\.offload=true needs parallel\.backend zero1, zero2 or zero3, found "ddp"'),
        ("sample.method=best", r"sample\.method"),
        ("negatives.schedule=[{checkpoint=7, step=300}]", r"negatives\.schedule names checkpoint 7, which is never written"),
        ("batch.clusters=no/such.npz", r"batch\.clusters='no/such\.npz' is no file"),
        ("search.top_k=0", r"search\.top_k=0"),
        ("lr=1", r"'lr=1' is not an override; expected section\.key=value"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(job_file, override, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        read_job(job_file, [override])
    assert "\n" not in str(error.value)


def test_sources_are_sections_of_their_own_and_survive_the_run_folder(job_file, tmp_path):
    with open(job_file, "a") as file:
        file.write('[sources.nq]\npath = "data/nq"\nweight = 2\n[sources.faq]\npath = "faq.jsonl"\n')
    jobs = read_job(job_file, ["sources.faq.query_prefix=ask: ", "sources.more.path=more.parquet", "batch.mode=homogeneous"])
    assert list(jobs.train.sources) == list(jobs.mine.sources) == ["nq", "faq", "more"]
    assert (jobs.train.sources["nq"].weight, jobs.train.sources["faq"].query_prefix) == (2.0, "ask: ")
    write_job(tmp_path / "kept.toml", jobs)
    assert read_job(tmp_path / "kept.toml", []) == jobs
    with pytest.raises(InputError, match=r"sources\.more="):
        refuse_other_job(tmp_path / "kept.toml", read_job(job_file, ["batch.mode=homogeneous", "sources.faq.query_prefix=ask: "]))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["sources.a.paht=x"], r"unknown key sources\.a\.paht; did you mean path\?"),
        (["sources.a.weight=2"], r"sources\.a\.path is missing; set it in the job file"),
        (["sources.a.path=x", "sources.a.weight=0"], r"sources\.a\.weight=0.* cannot be used; expected number > 0"),
        (["sources.a.path=x", "sources.a.weight=much"], r"sources\.a\.weight='much' cannot be used"),
        (
            ["sources.a.path=x", "data.path=y"],
            r"data\.path='y' \(--data\) has no effect beside sources\.a; set sources\.",
        ),
        (["sources.a=x"], r"'sources\.a=x' is not an override; expected .*sources\.NAME\.key=value"),
        (
            ["sources.a.path=x", "sources.a.batch=4"],
            r'sources\.a\.batch=4 has no effect with batch\.mode="mixed"; set batch\.mode',
        ),
        (
            ["sources.a.path=x", "sources.a.weight=4", "batch.mode=tasks"],
            r'sources\.a\.weight=4.0 has no effect with batch\.mode="tasks"',
        ),
        (
            ["sources.a.path=x", "sources.a.objective=infonce", "batch.mode=tasks"],
            r"sources\.a\.objective: there is no objective 'infonce'; did you mean 'info_nce'\?",
        ),
        (["batch.mode=task"], r"batch\.mode='task' cannot be used"),
        (["data.num_proc=0"], r"data\.num_proc=0 cannot be used; expected whole number > 0"),
    ],
)
def test_sources_that_cannot_be_used_are_one_sentence(job_file, overrides, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        read_job(job_file, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "there is no job file"),
        (b"[run\n", "is not a readable TOML file"),
        (b"\xff\xfe", "is not a readable TOML file"),
        (b"[sources]\na = 3\n", r"sources\.a is 3, expected a section \[sources\.a\] with keys"),
        (b"lr = 1e-4\n", r"unknown key lr outside of all sections; it belongs to another section: optim\.lr$"),
        (b"optim = 3\n", r"optim is 3, expected a section \[optim\]"),
        (b"sources = 3\n", r"sources is 3, expected a section \[sources\]"),
        (b"parallel = 3\n", r"parallel is 3, expected a section \[parallel\]"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "job.toml").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_job(tmp_path / "job.toml", [])


@pytest.mark.parametrize("work", ["checkpoints/LATEST", "negatives/LATEST", "evaluations/untrained.json"])
def test_a_folder_belongs_to_a_job_once_something_is_kept_in_it(job_file, tmp_path, work):
    keep_job(read_job(job_file, []))
    changed = read_job(job_file, ["optim.lr=2e-4"])
    keep_job(changed)  # the first one failed at its start
    assert read_job(tmp_path / "run" / "job.toml", []) == changed
    (tmp_path / "run" / work).parent.mkdir()
    (tmp_path / "run" / work).write_text("v000000")
    with pytest.raises(InputError, match=r"holds a run with optim\.lr=0\.0002, and this job has 0\.0001"):
        keep_job(read_job(job_file, []))
    keep_job(read_job(job_file, []), allow_change=True)


def test_the_folder_of_another_job_is_refused_by_the_field_that_differs(job_file, tmp_path):
    kept = tmp_path / "run" / "job.toml"
    write_job(kept, read_job(job_file, []))
    refuse_other_job(
        kept, read_job(job_file, ["launch.mine_ranks=3", "data.num_proc=3", "data.cache=elsewhere", "run.trackers=[]"])
    )
    with pytest.raises(InputError, match=r"holds a run with optim\.lr=0\.0001, and this job has 0\.0002"):
        refuse_other_job(kept, read_job(job_file, ["optim.lr=2e-4"]))
