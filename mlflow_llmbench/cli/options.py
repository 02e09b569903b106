"""Declarations of commands and their options.

A command is declared once, where its function is: name, help, options, examples, function. The options that are
measurement parameters are generated from the declared parameters (`records.cell`, `config.training`). `parser` makes
click commands of the declarations, `help` shows them, and `completion` completes their values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import Field, dataclass
from typing import Any, Literal

from ..config.choices import CHOICES, WORKLOADS
from ..config.spec import COMMANDS as PARAMETERS_OF
from ..config.spec import parse, read_yaml
from ..config.training import LOSSES, NAMES, TRAINING
from ..config.training import default_text as training_default
from ..records.backends import RUNTIMES
from ..records.cell import PARAMETERS, default_text
from ..records.invocation import EntryPoint, option_name

NOT_GIVEN = ("", "none")
"""Texts that stand for an option that is not given: a parameter of the MLproject needs a default, which is `none`."""

WORDS: dict[str, tuple[str, ...]] = {
    **CHOICES,
    "workload": WORKLOADS,
    "backend": tuple(RUNTIMES),
    "quality": ("none", "auto"),
    "device": ("auto", "cpu", "cuda", "xpu", "mps"),
    "place": ("here", "ray"),
    "loss": LOSSES,
    "flag": ("true", "false"),
}
"""Kind of a parameter → words that it takes; some take others too."""

METAVARS = {
    "text": "NAME",
    "count": "N",
    "number": "NUMBER",
    "size": "SIZE",
    "quant": "SCHEME",
    "budget": "BITS|SIZE",
    "plan_file": "FILE",
    "text_file": "FILE",
    "trace": "FILE",
    "data": "FILE,…",
    "interpreter": "PYTHON",
    "url": "URL",
    "launch": "COMMAND",
    "body": "JSON|FILE",
    "headers": "JSON|FILE",
    "pem": "FILE",
    "device": "[auto|cpu|cuda|cuda:N|xpu|xpu:N|mps]",
    "place": "[here|ray|ray://HOST:PORT]",
}
"""Kind of a parameter → what stands for its value in the help, unless it is a short choice of words."""

LONGEST_CHOICE = 40
"""Most characters of the words of a choice beside the name of the option. More are listed in the help."""


@dataclass(frozen=True)
class Option:
    """An option (`--name`), or a positional value of a command (a name without dashes).

    `flag`: takes no value. `switch`: takes true or false, and no value means true. `many`: one or more positional
    values, or an option that can be repeated. A positional value with a `default` may be left out. `optional`: `none`
    means that it is not given. `key`: name of the argument of the command's function. `short`: a second name of one
    letter. `entry_name`: name of a positional value as parameter of the MLproject.
    `words`: known values. `listed`: takes several, separated by commas. `panel`: key of `PANELS`, "" for an option of
    its own command.
    """

    name: str
    help: str
    metavar: str = ""
    default: object = None
    type: Callable[[str], object] = str
    required: bool = False
    flag: bool = False
    switch: bool = False
    many: bool = False
    optional: bool = False
    key: str = ""
    short: str = ""
    entry_name: str = ""
    words: tuple[str, ...] = ()
    listed: bool = False
    panel: str = ""

    @property
    def argument(self) -> str:
        """Name of the argument of the command's function, and of the parsed value."""
        return self.key or self.name.lstrip("-").replace("-", "_")

    @property
    def positional(self) -> bool:
        """True for a value without a name."""
        return not self.name.startswith("-")

    @property
    def called(self) -> str:
        """What stands for its value in a help page."""
        called = f"{self.metavar}…" if self.many else self.metavar
        return f"[{called}]" if self.positional and self.default else called

    def value(self, given: object) -> object:
        """Return the value of the function's argument: the parsed one, its default, or None if it is not given."""
        if self.positional and self.default:
            return given or ((self.default,) if self.many else self.default)
        if not self.optional:
            return given
        text = str(given or "").strip()
        return None if text in NOT_GIVEN else text


@dataclass(frozen=True)
class Command:
    """A command: its name, one line of help, options, and function, which returns the exit code.

    `first`: names of the options that people use first; the short help shows only them. `examples`: two command lines,
    without the name of the program. `failure_code` is the exit code of a failure, for a command whose exit code 1 is an
    answer. `entry_point` is the name of the MLproject's entry point that runs it, "" if there is none. `store`: when it
    uses the MLflow store, `if asked`, `first`, or `later`; a command of the last kind measures, and goes on without it.
    """

    name: str
    help: str
    options: tuple[Option, ...]
    function: Callable[..., int]
    description: str = ""
    first: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    failure_code: int = 1
    entry_point: str = ""
    store: Literal["if asked", "first", "later"] = "if asked"

    @property
    def sentence(self) -> str:
        """Its line of help as a sentence."""
        return f"{self.help[:1].upper()}{self.help[1:]}."

    @property
    def positional(self) -> tuple[Option, ...]:
        """Its values without a name."""
        return tuple(option for option in self.options if option.positional)

    def usage(self, program: str) -> str:
        """Return how it is called, by the name of the program."""
        return " ".join([program, self.name, *(option.called for option in self.positional), "[OPTIONS]"])

    def store_address(self, given: Mapping[str, object]) -> str | None:
        """Return the address of the store that this command is known to use, None if there is none."""
        of_environment = None if self.store == "if asked" else os.environ.get("MLFLOW_TRACKING_URI")
        return str(given.get("tracking_uri") or of_environment or "") or None

    def run(self, given: Mapping[str, object]) -> int:
        """Call the function with the parsed values. Returns the exit code."""
        return self.function(**{option.argument: option.value(given[option.argument]) for option in self.options})


def command(
    name: str,
    help: str,
    *options: Option,
    description: str = "",
    first: str = "",
    examples: tuple[str, ...] = (),
    failure_code: int = 1,
    entry_point: str = "",
    store: Literal["if asked", "first", "later"] = "if asked",
) -> Callable[[Callable[..., int]], Command]:
    """Declare a command by its function. See `Command`; `first` is one text of names."""
    return lambda function: Command(
        name, help, options, function, description, tuple(first.split()), examples, failure_code, entry_point, store
    )


def entry_points(commands: Iterable[Command]) -> Mapping[str, EntryPoint]:
    """Return the entry point of each command that has one."""
    return {
        command.name: EntryPoint(
            command.entry_point, tuple(option.entry_name for option in command.options if option.entry_name)
        )
        for command in commands
        if command.entry_point
    }


def store_options(commands: Iterable[Command]) -> Mapping[str, Set[str]]:
    """Return the options of each command that say which store and experiment it uses."""
    chosen = {option.argument for option in (TRACKING_URI, EXPERIMENT)}
    return {command.name: chosen & {option.argument for option in command.options} for command in commands}


def parameter_options(names: Iterable[str], lists: bool = True) -> tuple[Option, ...]:
    """Return one option per declared measurement parameter; without `lists`, the command measures one configuration."""
    return tuple(_parameter_option(name, PARAMETERS[name], default_text(name), lists) for name in names)


def training_options() -> tuple[Option, ...]:
    """Return one option per parameter of a training, which takes no lists."""
    return tuple(
        _parameter_option(name, TRAINING.get(name) or PARAMETERS[name], training_default(name), lists=False)
        for name in NAMES
    )


def _parameter_option(name: str, declared: Field[Any], default: str, lists: bool) -> Option:
    about = declared.metadata
    words = words_of(about)
    lists = lists and about["sweep"]
    metavar = "" if about["kind"] == "flag" and default == "false" and not about["sweep"] else metavar_of(about)
    told = as_options(about["help"])
    if words and not metavar.startswith("[") and not all(word in told for word in words) and about["kind"] != "flag":
        told += f": {', '.join(words)}"
    tells_default = not (default == about["unset"] == "none" or (about["kind"] == "flag" and default == "false"))
    more = f"{about['separator']}…" if lists else ""
    return Option(
        option_name(name),
        f"{told} (default: {default})" if tells_default else told,
        f"{metavar}{more}",
        switch=about["kind"] == "flag",
        key=name,
        words=(*filter(None, [about["unset"]]), *words),
        listed=lists and about["separator"] == ",",
        panel=about["panel"],
    )


def words_of(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words that a declared parameter takes; it may take others too."""
    return WORDS.get(about["kind"], ())


def metavar_of(about: Mapping[str, Any]) -> str:
    """Return what stands for the value of a declared parameter: a unit, a short choice of words, or its kind."""
    if about["kind"] == "flag":
        return "[true|false]"
    if about["metavar"] or about["kind"] in METAVARS:
        metavar = str(about["metavar"] or METAVARS[about["kind"]])
        return f"{metavar}|auto" if about["unset"] == "auto" else metavar
    choice = "|".join([*filter(None, [about["unset"]]), *words_of(about)])
    return f"[{choice}]" if len(choice) <= LONGEST_CHOICE else "NAME"


_SETTING = re.compile(rf"\b({'|'.join(PARAMETERS)})=")
_NAMED = re.compile(rf"\b({'|'.join(name for name in PARAMETERS if '_' in name)})\b(?!\.\w)")


def as_options(text: str) -> str:
    """Return a help text with its parameters written as options: `--quant int4` for quant=int4."""
    told = _SETTING.sub(lambda found: f"{option_name(found[1])} ", text)
    return _NAMED.sub(lambda found: option_name(found[1]), told)


def comma_list(text: str | None) -> frozenset[str]:
    """Return the words of a comma list; no words if it is not given."""
    return frozenset(filter(None, (text or "").split(",")))


def checked_parameters(
    given: Mapping[str, str | None], config: str | None = None, **defaults: str
) -> dict[str, object]:
    """Return the parameters of the file and the options, checked before anything slow is imported."""
    parameters = defaults | given_parameters(given, config)
    parse(parameters)
    return parameters


def given_parameters(given: Mapping[str, str | None], config: str | None = None) -> dict[str, object]:
    """Return the parameters of the file and the options that were given, unchecked."""
    return (read_yaml(config) if config else {}) | named_options(given)


def named_options(given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the options that the user gave."""
    return {name: value for name, value in given.items() if value is not None}


def permissions(trust_remote_code: bool, allow_pickle: bool) -> frozenset[str]:
    """Return the names of what is permitted."""
    given = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    return frozenset(name for name, allowed in given.items() if allowed)


SINGLE_OPTIONS = parameter_options(PARAMETERS_OF["run"], lists=False)
RUN_OPTIONS, ONLINE_OPTIONS, TUNE_OPTIONS = (
    parameter_options(PARAMETERS_OF[name]) for name in ("run", "online", "tune")
)

CONFIG = Option(
    "--config",
    "YAML file of parameters, such as a run's config.yaml; options override it",
    "FILE",
    panel="measurement",
)
NOISE = Option(
    "--noise",
    "relative differences below this count as noise (default: 0.01)",
    "RATIO",
    default=0.01,
    type=float,
)
SHARE = Option(
    "--share",
    "share of the best throughput per instance that a batch size must keep (default: 0.5)",
    "RATIO",
    default=0.5,
    type=float,
)
JSON = Option("--json", "print one JSON object as the last line of stdout", flag=True, panel="results")
ONLY_JSON = Option("--json", "print one JSON object instead of text", flag=True)
TRACKING_URI = Option(
    "--tracking-uri",
    "MLflow store (default: MLFLOW_TRACKING_URI, or a SQLite file here)",
    "URI",
    panel="results",
)
EXPERIMENT = Option("--experiment", "MLflow experiment (default: llmbench)", "NAME", panel="results")
ACCEPT_SUSPECT = Option(
    "--accept-suspect",
    "accept suspect results for this reason, which is recorded; none = do not accept them",
    "REASON",
    optional=True,
)
GOALS = ("throughput", "latency", "cost", "energy", "ttft", "tpot", "goodput")
"""Words of `--goal`: those of `analysis.decisions.recommend.GOALS`, which is not imported for a help page."""

GOAL = Option(
    "--goal",
    f"what to optimize: {', '.join(GOALS)} (default: throughput)",
    "GOAL",
    default="throughput",
    words=GOALS,
)
LIMITS = (
    Option(
        "--max-memory",
        "maximum peak memory, of the device if there is one: 6GB, 512MiB",
        "SIZE",
        optional=True,
    ),
    Option("--max-ttft", "maximum time to first token: 200ms (median), or p95=0.2s", "TIME", optional=True),
    Option("--max-tpot", "maximum time per output token: 50ms (mean), or p95=60ms", "TIME", optional=True),
    Option(
        "--min-quality",
        "quality limits: kl=0.05 (maximum), perplexity=12 (maximum), top1=0.95 (minimum)",
        "LIST",
        optional=True,
    ),
)
"""Limits that a recommended configuration keeps, see `analysis.decisions.limits`."""

PERMISSIONS = (
    Option("--trust-remote-code", "run code that comes with the model, if the run did", flag=True, panel="limits"),
    Option("--allow-pickle", "read weights stored as a pickle, if the run did", flag=True, panel="limits"),
)


def allow(*kinds: str) -> Option:
    """Return the option for kinds of differences that are accepted."""
    told = "compare results despite these differences"
    return Option("--allow", f"{told}: {', '.join(kinds)}", "LIST", optional=True, words=kinds, listed=True)


def output_dir(help: str) -> Option:
    """Return the option for the folder of measured results."""
    default = default_text("output_dir")
    return Option("--output-dir", f"{help} (default: {default})", "FOLDER", default=default, panel="results")
