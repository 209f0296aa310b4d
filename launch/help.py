"""How the help shows the commands: in groups, in the order in which a person needs them, on 80 columns."""

from typing import Any

from typer.core import TyperGroup

PANELS = {
    "Train": ("init", "run", "train", "mine", "merge"),
    "Look": ("status", "report", "compare", "eval", "search", "settings", "objectives"),
    "Data": ("data", "encode"),
    "Cluster": ("plan", "submit", "doctor"),
    "Proof": ("check", "bench"),
}
WORD_OF_TYPE = {"int": "N", "float": "X", "str": "TEXT", "path": "PATH"}  # what an option takes, where it does not say more


class Commands(TyperGroup):
    """The commands of negpool, each in its panel; those that no panel names come last."""

    def __init__(self, **about: Any):
        super().__init__(**about)
        for panel, names in PANELS.items():
            for name in names:
                if name in self.commands:
                    self.commands[name].rich_help_panel = panel  # type: ignore[attr-defined]
        _show_plainly(self)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the panels."""
        order = [name for names in PANELS.values() for name in names]
        return sorted(self.commands, key=lambda name: order.index(name) if name in order else len(order))


def _show_plainly(command: Any) -> None:
    """Let the help of a command, and of those below it, leave out types that say nothing: that a flag is a <bool>."""
    get_params = command.get_params

    def plain_params(ctx: Any) -> list[Any]:
        found = get_params(ctx)
        for param in found:
            if param.param_type_name == "argument":
                param.display_type_rich = lambda ctx: None  # its name and its help say it
            elif param.metavar is None and getattr(param, "is_flag", False):
                param.metavar = ""
            elif param.metavar is None:
                kind = param.display_type(ctx).strip("<>").removeprefix("list[").rstrip("]").split(" ")[0]
                param.metavar = WORD_OF_TYPE.get(kind.lower())
        return found

    command.get_params = plain_params
    for below in getattr(command, "commands", {}).values():
        _show_plainly(below)
