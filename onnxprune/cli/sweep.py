"""``onnxprune sweep MODEL.onnx --data D --targets 0.9,0.8,...``: what the model loses by what it costs."""

from __future__ import annotations

from dataclasses import asdict

from rich.text import Text

from onnxprune import documents
from onnxprune.cli import pages
from onnxprune.cli.options import Given, command, existing
from onnxprune.report import frontier
from onnxprune.report.console import Screen, plain


@command("sweep", model="MODEL.onnx")
def sweep(screen: Screen, given: Given) -> None:
    """Cut the model to a row of budgets and show what it loses by what it costs."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(given.model, "model")
    given.check_together()
    given.check_recovery()
    pages.check(given.model, given.html)
    with screen.progress() as progress:
        found = op.sweep(given.model, **given.arguments, progress=progress)
    if given.html is not None:
        documents.write(given.html, frontier.page(found))
    paths = [path for path in (given.folder, given.html) if path is not None]
    screen.wrote.extend(paths)
    if screen.as_json:
        screen.emit(plain(asdict(found)))
    screen.show(*frontier.render(found), *(Text.assemble(("wrote     ", "bold"), str(path)) for path in paths))
