"""Write the tables of plans in docs/scaling.md: `python docs/plans.py`. Takes some seconds, without data, weights and network.

Each table is what the command in the head of its job file prints.
"""

import shlex
from pathlib import Path

import typer

from launch.commands import app
from launch.tables import as_markdown

DOCS = Path(__file__).resolve().parent
JOBS = DOCS.parent / "launch" / "jobs" / "plans"
BEGIN, END = "<!-- plans: made by docs/plans.py -->\n", "<!-- end of plans -->\n"
PLANS = {
    "bert-base": "BERT-base, 65,536 queries of 8 passages",
    "decoder-lora": "A decoder of 7 billion parameters, LoRA",
    "decoder-fsdp2": "The same, all weights, FSDP2",
}


def plans() -> str:
    """Return a section for each plan."""
    parts = []
    for name, title in PLANS.items():
        words = command_of(JOBS / f"{name}.toml")
        shown = shlex.join(words).replace(" --", " \\\n  --")
        parts.append(f"## {title}\n\n```sh\n{shown}\n```\n\n{as_markdown(parts_of(words))}")
    return "\n".join(parts)


def command_of(job: Path) -> list[str]:
    """Return the command in the first lines of a job file."""
    lines = [line.removeprefix("#").strip() for line in job.read_text().splitlines() if line.startswith("#")]
    return shlex.split(" ".join(lines[: lines.index("")]).replace("\\", " "))


def parts_of(words: list[str]) -> list:
    """Return the tables that a command prints."""
    from launch.plan.plan_tables import plan_parts
    from launch.plan_commands import planned

    command = typer.main.get_command(app).commands["plan"]  # type: ignore[attr-defined]
    given = command.make_context("plan", words[2:]).params
    return plan_parts(planned(**{name: value for name, value in given.items() if name not in ("as_json", "out")}))


if __name__ == "__main__":
    page = DOCS / "scaling.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.partition(BEGIN)[0] + BEGIN + plans() + END + text.partition(END)[2], encoding="utf-8")
