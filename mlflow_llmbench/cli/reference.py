"""What is generated from the declarations: reference pages (parameters, commands, errors) and types of parameters."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field
from typing import Any

from ..config.choices import CHOICES, QUALITIES
from ..config.spec import COMMANDS as PARAMETERS_OF
from ..config.training import TRAINING
from ..records.cell import PARAMETERS, as_text
from ..records.errors import LlmbenchError
from ..records.invocation import PROGRAM, option_name
from ..records.parameter import PANELS
from ..reports.tables import table_of_markdown
from .main import GROUPS
from .options import (
    ONLINE_OPTIONS,
    RUN_OPTIONS,
    SINGLE_OPTIONS,
    Command,
    Option,
    metavar_of,
    training_options,
    words_of,
)

HEAD = ("parameter", "takes", "default", "meaning")
FOREVER = 1e9
"""A bound from here on says nothing."""

FEW = 3
"""A command that takes all parameters of another but so many is described by that command."""

OF_PARAMETERS = {*RUN_OPTIONS, *ONLINE_OPTIONS, *SINGLE_OPTIONS, *training_options()}
"""Options that are generated from a parameter."""

TYPES = {
    "count": ["int"],
    "number": ["float"],
    "flag": ["bool"],
    "size": ["int", "str"],
    "budget": ["float", "str"],
    "body": ["Mapping[str, object]", "str", "PathLike[str]"],
    "headers": ["Mapping[str, str]", "str", "PathLike[str]"],
}
"""Kind of a parameter → its types, unless it is a choice, a path or a text."""

PATHS = ("interpreter", "pem", "plan_file", "text", "text_file", "trace", "workload")
"""Kinds of parameters that may be paths."""

TYPES_HEAD = '''\
"""Types of the keyword arguments of `run`, `online` and `tune`, generated from the declarations by `make reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict
'''

NAMES = {*PARAMETERS, *TRAINING}
_SETTING = re.compile(rf"\b(?:{'|'.join(sorted(NAMES))})=[^\s:;()]*[^\s:;().,]")
_NAMED = re.compile(rf"(?<![\w/-])(?:{'|'.join(sorted(name for name in NAMES if '_' in name))})\b(?!\.\w)")
_BRACED = re.compile(r"\{\w+\}")


def parameters_markdown() -> str:
    """Return the page `docs/reference/parameters.md`."""
    panels = "\n\n".join(
        f"## {title}\n{_parameter_table(name for name, one in PARAMETERS.items() if one.metadata['panel'] == panel)}"
        for panel, title in PANELS.items()
    )
    training = table_of_markdown(HEAD, [_parameter_row(name, one) for name, one in TRAINING.items()])
    shared = ", ".join(f"`{name}`" for name in PARAMETERS_OF["qat"])
    return f"""# Parameters
The names are the same everywhere: `-P batch_size=4` under `mlflow run`, `--batch-size 4` on the command line,
`run(batch_size=4)` in Python, `batch_size: 4` in a YAML file for `--config`, and `batch_size` among the params of the
MLflow run. † takes a list with commas, which makes a sweep: one run for each combination; `\\,` is a comma within a
value, such as a path. `launch` is a list with ` ; ` between its values. *for* names the commands that take it: `run` is
also the entry point `main` of `mlflow run`, `online` the entry point `online`; `tune` takes almost all of both.
[How to measure](../measure.md) explains
those that people use first. This page is generated from the declarations in `mlflow_llmbench/records/cell.py` and
`mlflow_llmbench/config/training.py`.

{panels}

## Training
Parameters of `qat` alone ([Training for a quantization](../qat.md)). It takes these of the above too, without lists:
{shared}.

{training}
"""


def commands_markdown() -> str:
    """Return the page `docs/reference/commands.md`."""
    contents = "\n".join(
        f"- **{title}**: {', '.join(f'[{one.name}](#{PROGRAM}-{one.name})' for one in commands)}"
        for title, commands in GROUPS.items()
    )
    sections = "\n\n".join(
        "\n\n".join([f"## {title}", *map(_command_section, commands)]) for title, commands in GROUPS.items()
    )
    return f"""# Commands
`{PROGRAM}` alone shows all commands, `{PROGRAM} COMMAND --help` the options that people use first, and
`{PROGRAM} COMMAND --help-all` all of them. `{PROGRAM} --version` shows the version. The exit code is 0 for success, 1
for a failure, 2 for a wrong parameter or results that cannot be compared, and 130 after an interruption. Commands with
other exit codes say so here. This page is generated from the declarations in `mlflow_llmbench/cli/`.

{contents}

{sections}
"""


def errors_markdown() -> str:
    """Return the page `docs/reference/errors.md`."""
    table = table_of_markdown(
        ("error", "kind of", "meaning", "exit code", "outcome of the run"),
        [
            (
                f"`{kind.__name__}`",
                f"`{kind.__mro__[1].__name__}`",
                " ".join((kind.__doc__ or "").split()),
                str(kind.exit_code),
                f"`{kind.outcome}`" if hasattr(kind, "outcome") else "",
            )
            for kind in _kinds(LlmbenchError)
        ],
    )
    return f"""# Errors
The command line prints an error as one line: what is wrong, the value, and what to do. In Python the functions of the
package raise one of these, all of them kinds of `mlflow_llmbench.records.errors.LlmbenchError`. A cell that fails in a
sweep raises nothing: its run ends with an outcome, the tag `llmbench.outcome`, and the sweep goes on.
[What happens when …](../failures.md) lists failures with what the command does and what you do.
[Troubleshooting](../troubleshooting.md) lists the messages that people meet first. This page is generated from
`mlflow_llmbench/records/errors.py`.

{table}
"""


def parameter_types() -> str:
    """Return the module `mlflow_llmbench/config/parameter_types.py`."""
    run, online = (PARAMETERS_OF[command] for command in ("run", "online"))
    classes = {
        "SharedParameters(TypedDict, total=False)": ("`run` and `online`", [name for name in run if name in online]),
        "RunParameters(SharedParameters, total=False)": ("`run`", [name for name in run if name not in online]),
        "OnlineParameters(SharedParameters, total=False)": ("`online`", [name for name in online if name not in run]),
        "TuneParameters(RunParameters, OnlineParameters, total=False)": ("`tune`", []),
    }
    bodies = [
        f'class {head}:\n    """Parameters of {who}."""\n' + "".join(f"\n{_typed(name)}" for name in names)
        for head, (who, names) in classes.items()
    ]
    return "\n\n".join([TYPES_HEAD, *bodies])


def _typed(name: str) -> str:
    """Return the declaration of a key of a typed dictionary, with its meaning below."""
    told = f'"""{PARAMETERS[name].metadata["help"]}"""'
    return f"    {name}: {_type(name)}\n" + textwrap.indent("\n".join(textwrap.wrap(told, 116)), "    ") + "\n"


def _type(name: str) -> str:
    """Return the type of a parameter in Python. A list, or a text with commas, makes a sweep where that is allowed."""
    declared, about = PARAMETERS[name], PARAMETERS[name].metadata
    words = QUALITIES.values() if about["kind"] == "quality" else CHOICES.get(about["kind"], ())
    if words and not about["sweep"]:
        types = [f"Literal[{', '.join(json.dumps(word) for word in dict.fromkeys(words))}]"]
    else:
        types = TYPES.get(about["kind"], ["str", "PathLike[str]"] if about["kind"] in PATHS else ["str"])
    if about["sweep"]:
        types = [*types, "str", f"Sequence[{' | '.join(dict.fromkeys([*types, 'str']))}]"]
    if about["unset"] == "none" and declared.default is None:
        types = [*types, "None"]
    elif about["unset"]:
        types = [*types, *([] if "str" in types else [f'Literal["{about["unset"]}"]'])]
    return " | ".join(dict.fromkeys(types))


def _parameter_table(names: Iterable[str]) -> str:
    rows = [(*_parameter_row(name, PARAMETERS[name]), _commands_with(name)) for name in names]
    return table_of_markdown((*HEAD, "for"), rows)


def _commands_with(name: str) -> str:
    return ", ".join(f"`{command}`" for command, names in PARAMETERS_OF.items() if name in names and command != "tune")


def _parameter_row(name: str, declared: Field[Any]) -> tuple[str, str, str, str]:
    about = declared.metadata
    default = str(about["unset"]) if declared.default is None else as_text(name, declared.default)
    return f"`{name}`{' †' if about['sweep'] else ''}", _takes(about), f"`{default}`", _markdown(about["help"])


def _takes(about: Any) -> str:
    """Return the words that a parameter takes, or what stands for its value with its bounds."""
    if about["kind"] == "flag":
        return "`true`, `false`"
    if about["kind"] == "quant":
        return "[a scheme](schemes.md)"
    metavars = [word for word in metavar_of(about).strip("[]").split("|") if word != "NAME" or not words_of(about)]
    told = [f"`{word}`" for word in dict.fromkeys([*words_of(about), *metavars]) if word != about["unset"]]
    if about["kind"] in ("count", "number"):
        told[-1] += _bounds(about["low"], about["high"])
    return ", ".join([*told, *([f"`{about['unset']}`"] if about["unset"] else [])])


def _bounds(low: float, high: float) -> str:
    first, last = (f"{int(bound):,}" if bound == int(bound) else f"{bound:g}" for bound in (low, high))
    return f" from {first}" if high >= FOREVER else f" from {first} to {last}"


def _command_section(command: Command) -> str:
    calls = "\n".join([command.usage(PROGRAM), *(f"{PROGRAM} {example}" for example in command.examples)])
    told = " ".join(filter(None, [command.sentence, command.description]))
    parts = [f"### {PROGRAM} {command.name}\n{_markdown(told)}", f"```text\n{calls}\n```"]
    if command.entry_point:
        parts.append(f"Under MLflow: `mlflow run . -e {command.entry_point}`.")
    if own := [option for option in command.options if option not in OF_PARAMETERS]:
        parts.append(table_of_markdown(("option", "value", "meaning"), map(_option_row, own)))
    if shared := [option.argument for option in command.options if option in OF_PARAMETERS]:
        parts.append(f"[Parameters](parameters.md) as options: {_shared(shared)}.")
    return "\n\n".join(parts)


def _shared(names: Sequence[str]) -> str:
    """Return the parameters that a command takes: those of `run`, `online` or both but a few, or all names."""
    for command in ("run", "online"):
        without = [name for name in PARAMETERS_OF[command] if name not in names]
        if len(without) <= FEW and set(names) <= {*PARAMETERS_OF[command]}:
            return f"all for `{command}`" + (f" but {_option_names(without)}" if without else "")
    without = [name for name in dict.fromkeys(PARAMETERS_OF["run"] + PARAMETERS_OF["online"]) if name not in names]
    if len(without) <= FEW + 1:
        return f"all for `run` and `online` but {_option_names(without)}"
    return _option_names(names)


def _option_names(names: Iterable[str]) -> str:
    return ", ".join(f"`{option_name(name)}`" for name in names)


def _option_row(option: Option) -> tuple[str, str, str]:
    called = "argument" if option.positional else f"`{option.name}`" + (f", `{option.short}`" if option.short else "")
    value = ", ".join(f"`{word}`" for word in option.called.strip("[]").split("|") if word)
    return called, value, _markdown(f"{option.help}{' (required)' if option.required else ''}")


def _markdown(text: str) -> str:
    """Write settings, names of parameters and placeholders as code, and keep the columns of a table."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        coded = _SETTING.sub(lambda found: f"`{found[0]}`", parts[index]).split("`")
        for place in range(0, len(coded), 2):
            coded[place] = _BRACED.sub(r"`\g<0>`", _NAMED.sub(r"`\g<0>`", coded[place]))
        parts[index] = "`".join(coded)
    return "`".join(parts).replace("|", r"\|").replace("<", "&lt;")


def _kinds(kind: type[LlmbenchError]) -> Iterator[type[Any]]:
    """Return all kinds of an error that this package declares, as a tree is read."""
    for one in kind.__subclasses__():
        if one.__module__ == LlmbenchError.__module__:
            yield one
            yield from _kinds(one)
