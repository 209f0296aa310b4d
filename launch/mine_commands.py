"""`negpool mine`: the miner of a run, or hard negatives from any model to a file. Heavy imports stand inside the functions."""

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.options import MINING, SHORT, Asked, JobCommand, Json, option_of, quoted, setting_argument, with_short
from launch.output import print_json, results
from launch.recipe import two_shells
from trainer.errors import EXIT_STOPPED, InputError

mine_app = typer.Typer()
OF_SCORES = ("relative_margin", "absolute_margin", "max_score", "min_score")  # options that compare an encoder's scores


class Form(enum.StrEnum):
    """What `mine --out` writes; names as in mining/export.py."""

    ids = "ids"
    sentence_transformers = "sentence-transformers"
    triplet = "triplet"
    labeled_pair = "labeled-pair"
    labeled_list = "labeled-list"
    tevatron = "tevatron"
    flagembedding = "flagembedding"


@mine_app.command(cls=JobCommand, epilog=two_shells())
@with_short(MINING | SHORT)
def mine(
    words: Annotated[
        list[str] | None, setting_argument("job file, where there is one; settings", metavar="[JOB.toml] [section.key=value]...")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="one refresh from the newest checkpoint, then exit")] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help='without a run: model, run, "bm25", or folder of queries.npy and passages.npy'),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="data set; default: the job's data.path")] = None,
    out: Annotated[
        Path | None, typer.Option(help="write what was mined, or a run's newest negatives, to FILE.jsonl or .parquet")
    ] = None,
    form: Annotated[Form, typer.Option(metavar="FORM", help=f"of --out: {', '.join(Form)}")] = Form.ids,
    scores: Annotated[bool, typer.Option("--scores", help="write the model's scores in forms with texts, too")] = False,
    show: Annotated[
        str | None, typer.Option(metavar="QUERY_ID", help="show a query, named by its id or its text, and what it gets")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="one refresh from this one, such as step-00000200, then exit")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="PORT", help="figures for Prometheus on 127.0.0.1; 0: any free port")
    ] = None,
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Mine hard negatives for a run, or with any model to a file.

    With --show it shows what was mined. Under mpiexec or srun several ranks share the work.
    """
    job, overrides = _job_and_overrides(words or [], short, data)
    _refuse_idle(model, words or [], short)
    if model is None and job is None:
        raise InputError("there is nothing to mine from; give a job file, or --model and --data")
    if model is None and job is not None and out is None and show is None:
        return _mine_for_run(job, overrides, once, checkpoint, metrics_port, as_json)
    return _mine_to_file(job, overrides, model, Asked(out, form.value, scores, show), as_json)


def _mine_for_run(
    job: Path, overrides: list[str], once: bool, checkpoint: str | None, metrics_port: int | None, as_json: bool
) -> int:
    from launch.sides import mine_side

    how = mine_side(job, overrides, once, checkpoint, metrics_port)
    if as_json:
        print_json({"ended": how})
    return 0 if how == "finished" else EXIT_STOPPED


def _mine_to_file(job: Path | None, overrides: list[str], model: str | None, wanted: Asked, as_json: bool) -> int:
    """Mine with a model, or read what a run has mined, and print what came of it."""
    from launch.mine import Stopped, mine_model, read_newest
    from launch.mine_tables import shown_parts, written_parts

    if wanted.out is None and wanted.show is None:
        raise InputError("nothing would come of it; give --out FILE.jsonl, or --show QUERY_ID")
    try:
        found: dict[str, Any] | None
        if model is not None:
            found = mine_model(job, overrides, model, wanted)
        else:
            assert job is not None
            found = read_newest(job, overrides, wanted)
    except Stopped:
        return EXIT_STOPPED
    if found is not None and as_json:
        print_json(found)
    elif found is not None:
        for part in [*([shown_parts(found)] if "query_id" in found else []), *([written_parts(found)] if "out" in found else [])]:
            results().print(part)
    return 0


def _job_and_overrides(words: list[str], short: Sequence[str], data: Path | None) -> tuple[Path | None, list[str]]:
    """Return the job file, where the first word is one, and the overrides; --data is data.path."""
    job = Path(words[0]) if words and "=" not in words[0] else None
    overrides = words[job is not None :]
    if data is not None and any(word.startswith("data.path=") for word in overrides):
        raise InputError("--data is the setting data.path, which is given as well; leave one of them out")
    return job, [*overrides, *short, *([] if data is None else [f"data.path={quoted(str(data))}"])]


def _refuse_idle(model: str | None, words: Sequence[str], short: Sequence[str]) -> None:
    """Raise InputError where short options, or the name of a model, would have no effect."""
    settings = {word.partition("=")[0] for word in short}
    if model is None:
        if any(setting.startswith("model.") for setting in settings):
            raise InputError("options of a model go with --model; the checkpoints of a run say how their texts are read")
        if idle := next((name for name, each in MINING.items() if each.setting in settings), None):
            setting = MINING[idle].setting
            raise InputError(f"{option_of(idle)} goes with --model; a run has its settings in its job file, as {setting}")
        return
    from mining.find.supplied import holds_vectors  # brings torch, of which a run's job that cannot be used has no need

    if any(word.startswith("model.name=") for word in words):
        raise InputError("model.name has no effect beside --model, which names the model; leave one of them out")
    if any(setting.startswith("model.") for setting in settings) and (model == "bm25" or holds_vectors(Path(model))):
        raise InputError(f"--model {model} encodes nothing: options of a model have no effect on it")
    if model == "bm25" and (idle := next((name for name in OF_SCORES if MINING[name].setting in settings), None)):
        raise InputError(f"--model bm25 gives a positive no score to compare with: {option_of(idle)} has no effect")
