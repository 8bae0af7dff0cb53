"""Options of the command line, made from the declarations in onnxprune.settings."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from onnxprune.cli import config
from onnxprune.errors import Note, UsageError, argument, spelled
from onnxprune.report.console import Screen
from onnxprune.settings import (
    TARGET_KINDS,
    Flag,
    Integer,
    Paths,
    PathTo,
    Patterns,
    PerName,
    Setting,
    Targets,
    Word,
    check_dead_alone,
    check_needs,
    has_budget,
    options_of,
    settings_of,
    spell,
)


class HeadedOption(click.Option):
    """An option of a group of settings.

    Args:
        heading: the group that the whole help lists it under.
        brief: its line in the short help; empty: the short help is without it.
    """

    def __init__(self, *args: Any, heading: str = "Options", brief: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading, self.brief = heading, brief


class HeadedCommand(click.Command):
    """A command with two helps: one screen of common options, and all of them in groups.

    Args:
        examples: calls, as a user types them.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, purpose, examples and options."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        write_examples(formatter, self.examples)
        self.format_options(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write all options in their groups, or the essential ones and where the others are."""
        if ctx.meta.get(FULL_HELP):
            self.write_groups(ctx, formatter)
            return
        self.write_essential(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(f"'{ctx.command_path} --help-all' lists all {len(self._options(ctx))} options.")

    def write_groups(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group, in the order in which the groups first occur."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self._options(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "heading", "Help"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def write_essential(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line per option that most runs need."""
        brief = [param for param in self._options(ctx) if isinstance(param, HeadedOption) and param.brief]
        if not brief:
            return
        with formatter.section("Options"):
            formatter.write_dl([(_short_record(param), param.brief) for param in brief])

    def _options(self, ctx: click.Context) -> list[click.Parameter]:
        return [param for param in self.get_params(ctx) if not isinstance(param, click.Argument)]


def _short_record(param: HeadedOption) -> str:
    """Return an option with its value; a long list of words is called by the option's name."""
    value = param.metavar or ""
    named = f"{param.name or 'value'}".upper() if len(value) > _LONG_VALUE else value
    return ", ".join(param.opts) + (f" {named}" if named else "")


_LONG_VALUE = 20
FULL_HELP = "onnxprune.cli.whole_help"


def help_all() -> Callable[..., Any]:
    """Return the option that shows the whole help."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[FULL_HELP] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    described: dict[str, Any] = {"help": "Show all options, in groups, and exit."}
    return click.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=show, **described)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write calls, one per line."""
    if examples:
        with formatter.section("Examples"):
            for call in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{call}\n")


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

# Generic for the type checker since click 8.2, and not subscriptable at run time before.


class SettingType(_ParamType):
    """Values of one setting, as a user types them."""

    def __init__(self, setting: Setting) -> None:
        self.kind, self.argument = setting.typed or setting.kind, setting.name
        self.name = self.kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the checked value; raises UsageError."""
        return self.kind.parse(value, argument(self.argument)) if isinstance(value, str) else value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the words, names or files that a value may begin with."""
        kind = self.kind
        if isinstance(kind, PathTo) or "FILE" in kind.metavar:
            items = [CompletionItem(incomplete, type="dir" if kind.metavar == "DIR" else "file")]
            words = ("measure",) if "measure" in kind.metavar else _words_of(self.argument)
        else:
            items = []
            words = kind.words if isinstance(kind, Word) else _words_of(self.argument)
        return items + [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _words_of(name: str) -> Sequence[str]:
    """Return the prefixes of values of an open-ended setting."""
    if name == "device":
        from onnxprune import devices  # heavy: waits until it is needed

        return devices.names()
    if name == "target":
        return [f"{kind}=" for kind in TARGET_KINDS]
    if name == "criterion":
        from onnxprune.importance import criteria  # heavy: waits until it is needed

        return criteria.names()
    return ()


class CommandOptions:
    """The values that a user gave to a command: ``options.ratio`` is the value of that setting.

    Args:
        command: its name.
        values: of all options and positional arguments.
        typed: names of those that were typed.
    """

    def __init__(self, command: str, values: Mapping[str, Any], typed: Iterable[str]) -> None:
        self.command, self.values, self.typed = command, values, frozenset(typed)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The settings as the call in Python takes them.

        Raises:
            UsageError: a name is given twice with different values, or options do not go together.
        """
        named = [s for s in options_of(self.command) if s.python and s.name in self.values]
        arguments = {setting.name: self._argument(setting) for setting in named}
        if "data" in self.values:
            arguments["images"] = self._images()
        if "vbmf" in arguments:
            arguments["vbmf"] = self._noise()
        return arguments

    def check_together(self) -> None:
        """Check whether options go with each other, and files are there; raises UsageError."""
        for name, what in _READ.items():
            path = self.values.get(name)
            if path is not None and path != "measure":
                existing(Path(path), what, folder_allowed=name == "data")
        for name in ("cache", "folder"):
            path = self.values.get(name)
            if path is not None and path.exists() and not path.is_dir():
                raise UsageError(
                    f"{argument(name)} {str(path)!r} is not a folder", hint="Give a folder; a new one is made."
                )
        for library in self.values.get("custom_op_libraries", ()):
            existing(library, "library of operators")
        self._check_decided()
        typed = {} if "ratio" in self.typed else {"ratio": None}
        check_needs(self.command, {**self.values, **self.arguments, **typed})
        if self.values.get("providers") is not None:
            from onnxprune.runtime.latency import device  # heavy: waits until it is needed

            device(self.providers, self.threads)

    def check_recovery(self) -> None:
        """Check whether there are data to recover from; raises UsageError."""
        mode = self.values.get("recover")
        if self.data is None and mode not in (None, "none", "datafree"):
            raise UsageError(
                f"{argument('recover', mode)} needs calibration data, but {argument('data')} is missing",
                hint=f"Give inputs with {argument('data')} (a few hundred, without labels), or recover from synthetic "
                f"data, which is weaker: {argument('recover', 'datafree')}.",
            )

    @property
    def sources(self) -> list[Path]:
        """Files that are read beside the model."""
        return [path for path in (self.values.get("plan"), self.values.get("data")) if path is not None]

    @property
    def has_budget(self) -> bool:
        """Whether a budget was asked for."""
        typed = {} if "ratio" in self.typed else {"ratio": None}
        return "target" in self.values and has_budget({**self.values, **typed})  # elsewhere the drop is a gate

    def _argument(self, setting: Setting) -> Any:
        value, kind = self.values[setting.name], setting.kind
        if isinstance(kind, PerName):
            return unique(argument(setting.name), value) or None
        if isinstance(kind, Targets):
            return list(value) or None
        return tuple(value) if isinstance(kind, (Paths, Patterns)) else value

    def _images(self) -> Any:
        """Return the image options given on the command line, None where there are none."""
        parts = {s.into.partition(".")[2]: self.values[s.name] for s in options_of(self.command) if s.into}
        options = {name: value for name, value in parts.items() if value is not None}
        if not options:
            return None
        from onnxprune.runtime.images import ImageOptions  # heavy: waits until the arguments are known to be good

        scale = options.pop("scale", None)
        return ImageOptions(**options, scale=scale and scale[0])

    def _noise(self) -> float | None:
        """Return the share by which ranks above noise are moved; None where they are not asked for."""
        if self.calibration is not None and not self.vbmf:
            raise UsageError(
                f"{argument('calibration')} moves the ranks of {argument('vbmf')}, but {argument('vbmf')} is not given",
                hint=f"Give {argument('vbmf')}, or drop it.",
            )
        return (self.calibration or 0.0) if self.vbmf else None

    def _check_decided(self) -> None:
        """Refuse options that a plan or a budget decides, and would ignore; raises UsageError."""
        known = settings_of(self.command)
        typed = [setting for name, setting in known.items() if name in self.typed]
        by_plan = next((s for s in typed if "plan" in s.conflicts), None)
        if self.values.get("plan") is not None and by_plan is not None:
            raise UsageError(
                f"{argument(by_plan.name)} has no meaning with {argument('plan')}",
                hint="The plan already lists all changes: drop one of the two.",
            )
        if self.values.get("remove_dead"):
            deciding = [s for s in typed if "plan" in s.conflicts and s.name != "remove_dead"]
            check_dead_alone({s.name: self.values[s.name] for s in deciding})
        by_budget = next((s for s in typed if "budget" in s.conflicts), None)
        if self.has_budget and by_budget is not None:
            name = argument("target" if self.values.get("target") else "max_drop")
            excluded = argument(by_budget.name)
            raise UsageError(
                f"{excluded} and {name} were both given, but each sets how much to remove",
                hint=f"Drop one of the two: a budget allocates by itself; {excluded} is for pruning without a budget.",
            )


_READ = {
    "plan": "plan",
    "data": "data",
    "labels": "labels",
    "latency_table": "latency table",
    "sensitivity": "file of sensitivities",
}
"""Settings that are files to read, and their names in messages."""


def command(
    name: str, short: str, examples: Sequence[str], **positional: str
) -> Callable[[Callable[[Screen, CommandOptions], None]], HeadedCommand]:
    """Return a decorator that makes a function a command with the options of its settings.

    Args:
        name: of the command.
        short: its purpose in one line, for the list of commands.
        examples: calls for its help, as a user types them.
        positional: {argument: its name in help}.
    """

    def decorate(function: Callable[[Screen, CommandOptions], None]) -> HeadedCommand:
        @click.pass_context
        def run(ctx: click.Context, /, **values: Any) -> None:
            typed_names = [key for key in values if ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE]
            options, screen = _with_config(name, values, typed_names, ctx.obj)
            ctx.find_root().obj = screen
            function(screen, options)

        run.__doc__ = function.__doc__
        path = click.Path(path_type=Path)
        puts = [click.argument(key, type=path, metavar=metavar) for key, metavar in positional.items()]
        puts += [_option(setting, name) for setting in options_of(name)]
        puts.append(help_all())
        wrapped: Any = functools.reduce(lambda inner, put: put(inner), reversed(puts), run)
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
        described: dict[str, Any] = {"examples": examples, "short_help": short, "context_settings": settings}
        headed: HeadedCommand = click.command(name, cls=HeadedCommand, **described)(wrapped)
        return headed

    return decorate


def _with_config(
    name: str, values: dict[str, Any], typed_names: Sequence[str], screen: Screen
) -> tuple[CommandOptions, Screen]:
    """Return the options of the command line and of a file of settings, and the screen as both set it.

    Raises:
        UsageError: the file is missing or wrong.
    """
    named: Path | None = values["config"]
    if values["no_config"] and named is not None:
        raise UsageError(f"{argument('config')} and {argument('no_config')} contradict each other", hint="Drop one.")
    path = None if values["no_config"] else named and existing(named, "file of settings")
    if path is None and not values["no_config"]:
        path = config.find(Path.cwd())
    more = config.configured(name, path, values, typed_names)
    loud = int(more.values.get("verbose", 0)) - int(more.values.get("quiet", False))
    screen = replace(
        screen,
        as_json=screen.as_json or more.values.get("json", False),
        verbosity=screen.verbosity if {"quiet", "verbose"} & set(typed_names) else loud,
    )
    for key in more.values:
        screen.note(f"{screen.spelled(Note(argument(key)))}: set in {path}")
    for key, why in more.ignored.items():
        screen.note(screen.spelled(Note(f"{argument(key)} in {path} is ignored: it {why}")))
    typed = {s.name for s in options_of(name)} & set(typed_names)
    screen.about["settings_from"] = {
        **dict.fromkeys(sorted(typed), "command line"),
        **dict.fromkeys(more.values, str(path)),
    }
    return CommandOptions(name, {**values, **more.values}, {*typed_names, *more.values}), screen


def _option(setting: Setting, command: str) -> Callable[..., Any]:
    """Return the click option of a setting."""
    names = [*filter(None, [setting.short]), setting.option or setting.flag, setting.name]
    common: dict[str, Any] = {"cls": HeadedOption, "heading": setting.on[command], "brief": setting.brief}
    common["help"] = spelled(setting.help, spell(command))
    kind = setting.typed or setting.kind
    if setting.name == "verbose":
        return click.option(*names, count=True, **common)
    if isinstance(kind, Flag):
        if setting.default and "/" not in setting.option:  # an option that turns something off
            return click.option(*names, is_flag=True, callback=lambda _ctx, _param, value: not value, **common)
        undecided = setting.default is None and "/" in setting.option
        return click.option(*names, is_flag=True, default=None if undecided else bool(setting.default), **common)
    if setting.many:
        return click.option(*names, type=SettingType(setting), multiple=True, metavar=kind.metavar, **common)
    value = setting.default
    shown = value is not None and not (isinstance(kind, Integer) and value in (0, 1)) and setting.name != "recover"
    value = ",".join(map(str, value)) if isinstance(value, tuple) else value
    more: dict[str, Any] = {"default": value, "show_default": shown, "metavar": kind.metavar}
    if setting.bare:
        more |= {"is_flag": False, "flag_value": setting.bare}
    return click.option(*names, type=SettingType(setting), **more, **common)


def unique(name: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Repeated ``NAME=VALUE`` options as a mapping; raises UsageError when one name is given two values."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and values[key] != value:
            raise UsageError(f"{name} {key} is given twice, with different values", hint="Give it once.")
        values[key] = value
    return values


def existing(path: Path, what: str, *, folder_allowed: bool = False) -> Path:
    """``path`` when it is there; raises UsageError with the nearest name in its folder when it is not."""
    if path.is_file() or (folder_allowed and path.is_dir()):
        return path
    if path.is_dir():
        from onnxprune.io.formats import guess_folder

        known = guess_folder(path) if what == "model" else None
        hint = f"It is {known.name}. {known.hint}" if known is not None else "Give a file."
        raise UsageError(f"{what} {str(path)!r} is a folder", hint=hint)
    if not path.parent.is_dir():
        raise UsageError(f"{what} {str(path)!r} not found", hint=f"The folder {str(path.parent)!r} does not exist.")
    if path.exists():
        raise UsageError(f"{what} {str(path)!r} is no ordinary file", hint="Give a file that can be read twice.")
    names = [entry.name for entry in path.parent.iterdir() if entry.name != path.name]
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"Did you mean {str(path.with_name(near[0]))!r}?" if near else "Check the path."
    raise UsageError(f"{what} {str(path)!r} not found", hint=hint)


def check_criterion(options: CommandOptions) -> None:
    """Check that there is such a criterion, with the data it needs; raises UsageError."""
    if options.criterion is None:
        return
    from onnxprune.importance import criteria
    from onnxprune.importance.scores import needs_data

    criterion = criteria.get(options.criterion)
    blind = options.values.get("plan") is None and options.data is None
    if blind and criteria.needs_of(criterion):
        raise needs_data(options.criterion)


def beside(model: Path, what: str) -> Path:
    """``MODEL.WHAT.onnx`` beside a model."""
    return model.with_name(f"{model.name.removesuffix('.onnx')}.{what}.onnx")
