"""The command group: a first argument that is no subcommand is a model to prune."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from onnxprune.cli import failure
from onnxprune.cli.commands import (
    compare,
    criteria,
    devices,
    factorize,
    inspect,
    profile,
    prune,
    recover,
    sensitivity,
    sparsify,
    sweep,
    train,
)
from onnxprune.cli.options import FULL_HELP, HeadedCommand, help_all, write_examples
from onnxprune.errors import UsageError
from onnxprune.report.console import Screen
from onnxprune.settings import COMMANDS, spell

DEFAULT = "prune"
_NOTHING = "onnxprune.cli.nothing_given"
_LOUD_AND_QUIET = "onnxprune.cli.loud_and_quiet"
_OWN_FLAGS = ("-h", "--help", "--help-all", "--version")


_KIND_OF_OUTPUT = re.compile(r"(?P<joined>--output=)?(?P<kind>[^=]+=[a-z]+(:-?\d+)?)")


def _kinds_apart(args: list[str]) -> list[str]:
    """Return arguments in which ``--output NAME=KIND`` is ``--output-kind``: the name of a file ends otherwise."""
    after = iter(["", *args])
    apart: list[str] = []
    for before, arg in zip(after, args, strict=False):
        match = _KIND_OF_OUTPUT.fullmatch(arg)
        if match and match["joined"]:
            apart.append(f"--output-kind={match['kind']}")
        elif match and before == "--output":
            apart[-1:] = ["--output-kind", arg]
        else:
            apart.append(arg)
    return apart


class DefaultGroup(click.Group):
    """A group that runs ``prune`` when no subcommand is named, and turns every failure into an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the program; also where not even ``--help`` can be shown."""
        try:
            return super().main(*args, **extra)
        except OSError as error:
            sys.exit(failure.show_unwritable(error))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default subcommand in front of a model or an option; keep mistyped subcommands."""
        args = _kinds_apart(args)
        ctx.obj = _screen(args)
        ctx.meta[_NOTHING] = not args
        ctx.meta[_LOUD_AND_QUIET] = all(_volume(args))
        if args and args[0] not in self.commands and args[0] not in _OWN_FLAGS and not self._mistyped(args):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def _mistyped(self, args: list[str]) -> bool:
        """Return whether a command is misspelled (``inspekt model.onnx``): a bare word, no file, followed by words."""
        word = args[0]
        return word.isalpha() and not Path(word).exists() and any(not other.startswith("-") for other in args[1:2])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; an unknown one is named beside the nearest there is, whichever release of click runs."""
        if args[0] not in self.commands:
            if ctx.resilient_parsing:
                return None, None, []
            near = get_close_matches(args[0], self.commands, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"'{ctx.command_path} --help' lists all commands."
            raise UsageError(f"no such command '{args[0]}'", hint=hint)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the first argument: a command, an option of pruning, or the model file."""
        items = super().shell_complete(ctx, incomplete)
        command = self.commands[DEFAULT]
        with command.make_context(DEFAULT, [], parent=ctx, resilient_parsing=True) as inner:
            of_default = command.shell_complete(inner, incomplete)
        known = {item.value for item in items}
        items += [item for item in of_default if item.value not in known]
        return items if incomplete.startswith("-") else [*items, CompletionItem(incomplete, type="file")]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; any failure ends here."""
        with failure.stoppable():
            try:
                if ctx.meta[_LOUD_AND_QUIET]:
                    raise UsageError("--quiet and --verbose contradict each other", hint="Drop one of the two.")
                if ctx.meta[_NOTHING]:
                    raise UsageError(
                        "no model given", hint="For example: onnxprune model.onnx --ratio 0.3, or onnxprune --help."
                    )
                result = super().invoke(ctx)
                failure.check_shown(ctx.obj)
            except click.exceptions.Exit:
                raise
            except BaseException as error:
                ctx.exit(failure.show(error, ctx.obj, ctx.command_path))
        return result

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of the whole program: how to call it, then the options of pruning, then the other commands."""
        command = self.commands[DEFAULT]
        assert isinstance(command, HeadedCommand)
        formatter.write_usage(ctx.command_path, "MODEL.onnx [options]")
        formatter.write_usage(ctx.command_path, "COMMAND ... [options]", prefix="       ")
        command.format_help_text(ctx, formatter)
        write_examples(formatter, command.examples)
        names = ctx.help_option_names
        with click.Context(command, parent=ctx.parent, info_name=ctx.info_name, help_option_names=names) as inner:
            inner.meta.update(ctx.meta)
            if ctx.meta.get(FULL_HELP):
                command.write_groups(inner, formatter)
            else:
                command.write_essential(inner, formatter)
        shows_all = ctx.meta.get(FULL_HELP)
        listed = [(n, entry.get_short_help_str(64)) for n, entry in self.commands.items() if shows_all or n != DEFAULT]
        with formatter.section("Commands"):
            formatter.write_dl(listed)
        formatter.write_paragraph()
        if shows_all:
            codes = "Exit codes: 0 done, 2 bad input, 3 model not processable, 4 validation failed, 5 gate not met. "
            formatter.write_text(f"{codes}On anything but 0 nothing is written.")
        else:
            formatter.write_text("COMMAND --help explains a command, --help-all lists all options.")


def _screen(args: list[str]) -> Screen:
    """Return the streams set by the arguments, before parsing, so that a parsing error obeys ``--json``."""
    quiet, loud = _volume(args)
    command = args[0] if args and args[0] in COMMANDS else DEFAULT
    verbosity = -1 if quiet and not loud else min(loud, 2)
    screen = Screen.open(as_json="--json" in _flags(args), verbosity=verbosity, spell=spell(command))
    screen.about.update(command=command, command_line=list(args), settings_from={})
    return screen


def _volume(args: list[str]) -> tuple[bool, int]:
    """Return whether arguments ask for quiet, and how often for more; short flags may be joined, such as ``-qv``."""
    flags = _flags(args)
    short = "".join(flag[1:] for flag in flags if re.fullmatch(r"-[qv]+", flag))
    return "q" in short or "--quiet" in flags, short.count("v") + flags.count("--verbose")


def _flags(args: list[str]) -> list[str]:
    """Return the arguments in front of ``--``, which ends the options."""
    return args[: args.index("--")] if "--" in args else args


def _version() -> str:
    try:
        return metadata.version("onnxprune")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"onnxprune {_version()}")
        ctx.exit()


@click.group(
    cls=DefaultGroup,
    no_args_is_help=False,
    invoke_without_command=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
@help_all()
def main() -> None:
    """Cut channels out of an ONNX model, exactly, and verify the result in onnxruntime."""


main.add_command(prune)
main.add_command(train)
main.add_command(recover)
main.add_command(factorize)
main.add_command(sparsify)
main.add_command(inspect)
main.add_command(compare)
main.add_command(profile)
main.add_command(sensitivity)
main.add_command(sweep)
main.add_command(criteria)
main.add_command(devices)
