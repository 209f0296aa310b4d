"""`negpool eval`, `search`, `encode` and `merge`: commands on models that are there. Heavy imports stand inside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.counted import counted
from launch.options import SHORT, Data, Json, Model, Settings, setting_argument, split_words, with_short
from launch.output import measures_table, print_json, results, start_logging
from trainer.errors import InputError

model_app = typer.Typer()


@model_app.command("eval")
@with_short(SHORT)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='model folder, run folder, hub name, package, or "bm25"')],
    data: Data,
    overrides: Settings = None,
    split: Annotated[str, typer.Option(help="qrels/NAME.tsv")] = "test",
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Print nDCG@10, MRR@10 and recall of a model on a data set.

    Under torchrun or srun the corpus is shared out over the ranks.
    """
    from launch.models import evaluate_named
    from launch.named import read_settings

    measures = evaluate_named(model, read_settings([*(overrides or []), *short], data), split)
    if measures is not None and as_json:
        print_json({"model": model, "data": str(data), "split": split, **measures})
    elif measures is not None:
        results().print(measures_table({model: measures}, f"{data}, {split} queries"))
    return 0


@model_app.command()
@with_short(SHORT)
def search(
    model: Model,
    data: Data,
    words: Annotated[
        list[str] | None,
        setting_argument("what to look for; settings", "model", "data", "encode", metavar="[WORDS]... [section.key=value]..."),
    ] = None,
    query_id: Annotated[
        str | None, typer.Option(metavar="ID", help="ask with this query of the data set, by its id or its text")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="how many results")] = 5,
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Show what a model finds for words, or for a query of the data.

    The data set is encoded once, and kept for the next search.
    """
    from launch.models import search_corpus
    from launch.named import read_settings

    start_logging()
    asked, overrides = split_words(words or [])
    question = " ".join(asked).strip()
    if bool(question) == (query_id is not None):
        raise InputError(
            "a search takes a question in words or --query-id ID, and here are " + ("both" if question else "neither")
        )
    found = search_corpus(model, read_settings([*overrides, *short], data), question, query_id, top)
    if as_json:
        print_json(found)
        return 0
    from launch.hits import hits_text

    results().print(hits_text(found, results().width))
    return 0


@model_app.command()
@with_short(SHORT)
def encode(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="a text on each line (.txt), records with a column of texts (.jsonl, .parquet, …), or a data set"
        ),
    ],
    *,
    overrides: Settings = None,
    out: Annotated[Path, typer.Option(help="FILE.npy, with the ids in FILE.ids.txt, or FILE.parquet")],
    side: Annotated[
        Literal["query", "passage"] | None,
        typer.Option(help="whose texts they are; default: queries where the file is called so, else passages"),
    ] = None,
    short: Sequence[str] = (),
    as_json: Json = False,
) -> int:
    """Write the embeddings of texts, with their ids.

    The texts are those of a file, or the queries or passages of a data set, in their order. Of a data set, queries.npy and
    passages.npy in one folder are what `negpool mine --model FOLDER` takes. Under torchrun or srun several ranks share the work.
    """
    from launch.embed import encode_to_file
    from launch.named import read_settings

    found = encode_to_file(model, read_settings([*(overrides or []), *short], data), side, out)
    if found is not None and as_json:
        print_json({"model": model, "data": str(data), **found})
    elif found is not None:
        ids = f"; ids in {found['ids']}" if found["ids"] else ""
        results().print(
            f"{out}: {counted(found['texts'], found['side'])} of {data}, {counted(found['width'], 'number')} each{ids}",
            markup=False,
        )
    return 0


@model_app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="folder to make")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="model, checkpoint or run folders, or packages")],
    how: Annotated[str, typer.Option(help="mean, or delta: each tensor by how far training has moved it")] = "mean",
    base: Annotated[str | None, typer.Option(help="what training began from, for --how delta")] = None,
    weights: Annotated[str | None, typer.Option(help="one number for each model, as in 2,1,1; default: equal")] = None,
    as_json: Json = False,
) -> int:
    """Average the weights of several models into one."""
    from launch.models import merge_named_models

    start_logging()
    found = merge_named_models(out, models, how, base, weights)
    if as_json:
        print_json(found)
    else:
        results().print(
            f"{out}: {counted(len(models), 'model')}, merged by {how}; SentenceTransformer and AutoModel load it", markup=False
        )
    return 0
