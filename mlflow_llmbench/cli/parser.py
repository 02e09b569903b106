"""The parser: click commands made of the declared ones, with errors in our form.

The arguments are parsed into a `Call`, which `main` runs: click never sees an interruption or an error of a command.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from .. import __version__
from ..records.errors import UsageError
from ..records.invocation import PROGRAM, option_name
from ..records.text import nearest
from . import completion, help
from .options import Command, Option
from .output import show

HELP, HELP_ALL = "--help", "--help-all"

Groups = Mapping[str, Sequence[Command]]
"""Title of a group → its commands, in the order of the help."""


@dataclass(frozen=True)
class Call:
    """A command as the user called it, with its parsed values by argument."""

    command: Command
    values: Mapping[str, object]

    def run(self) -> int:
        """Run it. Returns the exit code."""
        return self.command.run(self.values)


def parse(groups: Groups, arguments: Sequence[str], program: str = PROGRAM) -> Call:
    """Parse the arguments of the program. Raises UsageError, or click's Exit after a help page or the version."""
    parser = Program(groups, program)
    try:
        with parser.make_context(program, list(arguments)) as context:
            call = parser.invoke(context)
    except click.UsageError as error:
        raise UsageError(_told(error)) from None
    assert isinstance(call, Call)
    return call


class Program(click.Group):
    """The program: its commands, made when they are called."""

    def __init__(self, groups: Groups, program: str = PROGRAM) -> None:
        super().__init__(program, add_help_option=False, no_args_is_help=False)
        self.groups = groups
        self.declared = {command.name: command for commands in groups.values() for command in commands}
        self.params = [
            _page("--version", "show the version", lambda _: f"llmbench {__version__}"),
            _page(HELP, "show this page", lambda _: help.program_page(groups, program), "-h"),
        ]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(self.declared)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the parser of a command."""
        declared = self.declared.get(cmd_name)
        return ParsedCommand(declared, self.name or PROGRAM) if declared else None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments before the command. Without any, show what there is, and exit with 2."""
        if not args and not ctx.resilient_parsing:
            show(help.program_page(self.groups, ctx.command_path), sys.stderr)
            ctx.exit(2)
        with _errors_of(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names, and the arguments after it."""
        name = args[0]
        if name not in self.declared and not ctx.resilient_parsing:
            raise UsageError(f"Unknown command: {name}.{_meant(name, self.declared)} See `{ctx.command_path} --help`.")
        return name, self.get_command(ctx, name), args[1:]


class ParsedCommand(click.Command):
    """Parser of one declared command. Its result is a `Call`."""

    def __init__(self, declared: Command, program: str) -> None:
        def pages(all: bool) -> Any:
            return lambda _: help.command_page(declared, program, all)

        self.declared = declared
        own: list[click.Parameter] = [_parameter(option) for option in declared.options]
        own.append(_page(HELP, "show this page", pages(all=False), "-h"))
        if help.has_more(declared):
            own.append(_page(HELP_ALL, "show all options", pages(all=True)))
        super().__init__(
            declared.name,
            params=own,
            callback=lambda **values: Call(declared, values),
            help=declared.help,
            add_help_option=False,
            context_settings={"allow_extra_args": True},
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; refuse an option without its value, a list given twice, and arguments that are too many."""
        names = {option.name for option in self.declared.options if not option.positional}
        valued = names - {option.name for option in self.declared.options if option.flag or option.switch}
        for word, following in itertools.pairwise(args):
            if word in valued and following in names and not ctx.resilient_parsing:
                raise UsageError(f"{word} needs a value.{_see(ctx)}")
        if not ctx.resilient_parsing:
            self._refuse_twice(args)
        with _errors_of(ctx):
            rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            name, is_given, value = rest[0].partition("=")
            meant = option_name(name)
            advice = f" Write {meant} {value}." if is_given and meant in names else ""
            raise UsageError(f"Unexpected argument: {rest[0]}.{advice or _see(ctx)}")
        return rest

    def _refuse_twice(self, args: Sequence[str]) -> None:
        """Raise UsageError for a list that is given twice: only the last one would count. Of others the last counts."""
        words = args[: args.index("--")] if "--" in args else args
        for option in self.declared.options:
            given = [number for number, word in enumerate(words) if word.partition("=")[0] == option.name]
            if len(given) < 2 or option.many or not (option.listed or option.metavar == "LIST"):
                continue
            values = ",".join(words[n].partition("=")[2] or "".join(words[n + 1 : n + 2]) for n in given)
            raise UsageError(
                f"{option.name} is given {len(given)} times. Give it once, with all values: {option.name} {values}."
            )


def _parameter(option: Option) -> click.Parameter:
    settings: dict[str, Any] = {
        "type": click.UNPROCESSED if option.type is str else _number(option),
        "shell_complete": lambda ctx, param, incomplete: _completed(option, incomplete),
    }
    if option.positional:
        metavar = option.metavar or option.name.upper()
        return click.Argument(
            [option.argument],
            nargs=-1 if option.many else 1,
            required=not option.default,
            metavar=metavar,
            **settings,
        )
    if option.flag:
        names = [*filter(None, [option.short, option.name]), option.argument]
        return click.Option(names, is_flag=True, help=option.help)
    settings |= {"help": option.help, "metavar": option.metavar}
    if option.many:
        settings |= {"multiple": True}
    elif option.switch:
        settings |= {"is_flag": False, "flag_value": "true"}
    else:
        settings |= {"required": True} if option.required else {"default": option.default}
    return click.Option([option.name, option.argument], **settings)


def _number(option: Option) -> Callable[[str], object]:
    """Return the converter of an option that takes a number."""

    def convert(text: str) -> object:
        try:
            return option.type(text)
        except ValueError:
            kind = "a whole number" if option.type is int else "a number"
            raise UsageError(f"{option.name} is not {kind}: {text}. Give one such as {option.default}.") from None

    return convert


def _completed(option: Option, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(value, type=kind) for value, kind in completion.values(option, incomplete)]


def _page(name: str, told: str, printed: Callable[[click.Context], Any], *other: str) -> click.Option:
    """Return an option that prints a page and ends."""

    def callback(ctx: click.Context, param: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            page = printed(ctx)
            print(page) if isinstance(page, str) else show(page)
            ctx.exit()

    return click.Option([*other, name], is_flag=True, expose_value=False, is_eager=True, help=told, callback=callback)


# Errors


@contextlib.contextmanager
def _errors_of(context: click.Context) -> Iterator[None]:
    """Name the command in errors that click raises without it."""
    try:
        yield
    except click.UsageError as error:
        error.ctx = error.ctx or context
        raise


def _told(error: click.UsageError) -> str:
    """Return an error of click in our words: what is wrong, the value, and what to do."""
    context = error.ctx
    assert context
    if isinstance(error, click.NoSuchOption):
        return _unknown_option(context, error.option_name)
    if isinstance(error, click.BadOptionUsage):
        takes = any(error.option_name in param.opts for param in context.command.params if _takes_value(param))
        return f"{error.option_name} {'needs a value' if takes else 'takes no value'}.{_see(context)}"
    if isinstance(error, click.MissingParameter) and isinstance(context.command, ParsedCommand) and error.param:
        option = next(one for one in context.command.declared.options if one.argument == error.param.name)
        name = option.metavar if option.positional else option.name
        return f"{name} is missing: {option.help}.{_see(context)}"
    return f"{error.format_message().rstrip('.')}.{_see(context)}"


def _unknown_option(context: click.Context, name: str) -> str:
    command = context.command
    if isinstance(command, Program):
        usual_first = sorted(command.declared.values(), key=lambda one: one.entry_point != "main")
        having = next((one.name for one in usual_first if name in {o.name for o in one.options}), "")
        if having:
            return f"The command comes first, then {name}: {context.command_path} {having} {name} …"
    known = [opt for param in command.params if isinstance(param, click.Option) for opt in param.opts]
    return f"Unknown option: {name}.{_meant(name, known)}{_see(context)}"


def _takes_value(param: click.Parameter) -> bool:
    return not (isinstance(param, click.Option) and param.is_flag)


def _meant(name: str, known: Iterable[str]) -> str:
    by_letters = {one.lstrip("-"): one for one in known if not one.startswith("-") or one.startswith("--")}
    near = nearest(name.lstrip("-"), by_letters)
    return f" Did you mean {by_letters[near]}?" if near else ""


def _see(context: click.Context) -> str:
    names = {opt for param in context.command.params for opt in param.opts}
    return f" See `{context.command_path} {HELP_ALL if HELP_ALL in names else HELP}`."
