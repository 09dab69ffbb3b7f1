"""Commands of plug-ins: entry points of the group ``normfree.commands``.

An entry point is the command's name and its function, declared as for typer. Listing the commands reads metadata only;
a plug-in is imported when its command runs or prints its help.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from normfree.cli.verbose import OPTION, be_verbose
from normfree.errors import InputError

GROUP = "normfree.commands"
KNOWN = {
    "private-cost": "the plug-in normfree-private; run `make private`, or `pip install --editable "
    "packages/normfree-private`, in a checkout of Normfree"
}
"""Commands of Normfree's own plug-ins, and how to install them."""


class PluginCommand(TyperCommand):
    """A command that stays unimported until it runs. Its line in the list of commands is its distribution's summary."""

    def __init__(self, entry: metadata.EntryPoint) -> None:
        summary = entry.dist.metadata["Summary"] if entry.dist is not None else None
        super().__init__(name=entry.name, help=summary, short_help=summary)
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the plug-in's own command, which then parses and runs.

        Raises:
            InputError: the plug-in cannot be imported.
        """
        try:
            function = self._entry.load()
        except (ImportError, AttributeError) as error:
            plugin = self._entry.dist.name if self._entry.dist is not None else self._entry.value
            raise InputError(f"the plug-in {plugin} cannot be imported ({error}); install it again") from error
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        app.command(self._entry.name)(function)
        return get_command(app).make_context(info_name, args, parent=parent, **extra)


class CommandGroup(TyperGroup):
    """Normfree's commands, then those of plug-ins. A plug-in cannot replace a command."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        added = {entry.name for entry in metadata.entry_points(group=GROUP)} - self.commands.keys()
        return [*self.commands, *sorted(added)]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with; ``--verbose`` among its options is taken out."""
        own = args[: args.index("--")] if "--" in args else args
        if OPTION in own[1:]:
            args = [*(each for each in own if each != OPTION), *args[len(own) :]]
            be_verbose(True)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command called ``cmd_name``; None if there is none.

        Raises:
            InputError: several plug-ins have a command of this name, or a plug-in of Normfree is not installed.
        """
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        entries = list(metadata.entry_points(group=GROUP, name=cmd_name))
        if len(entries) > 1:
            names = ", ".join(entry.dist.name if entry.dist is not None else entry.value for entry in entries)
            raise InputError(f"several plug-ins have a command {cmd_name}: {names}; uninstall all but one")
        if not entries and cmd_name in KNOWN and not ctx.resilient_parsing:
            raise InputError(f"{cmd_name} is a command of {KNOWN[cmd_name]}")
        return PluginCommand(entries[0]) if entries else None
