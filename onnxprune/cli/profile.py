"""``onnxprune profile MODEL.onnx -o device.json``: measure what every layer takes at how many channels."""

from __future__ import annotations

from rich.text import Text

from onnxprune.cli.options import Given, command, existing
from onnxprune.errors import UsageError, argument
from onnxprune.report import profile as shown
from onnxprune.report.console import Screen, plain


@command("profile", model="MODEL.onnx")
def profile(screen: Screen, given: Given) -> None:
    """Measure on this machine what every layer takes at how many channels."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    output = given.output
    existing(given.model, "model")
    given.check_together()
    if output is not None and output.resolve() == given.model.resolve():
        raise UsageError(f"{argument('output')} is the model itself", hint="Give another path for the table.")
    with screen.progress() as progress:
        found = op.profile(given.model, **given.arguments, progress=progress)
    if output is not None:
        found.save(output)
        screen.wrote.append(output)
    if screen.as_json:
        screen.emit({**plain(found.facts), "table": str(output) if output else None})
    wrote = [Text.assemble(("wrote     ", "bold"), str(output))] if output else []
    screen.show(*shown.render(found.facts, name_width=screen.name_width, every=screen.verbosity > 0), *wrote)
