"""``onnxprune sensitivity MODEL.onnx --data D``: what cutting each group alone does to the whole model."""

from __future__ import annotations

from dataclasses import asdict

from rich.text import Text

from onnxprune import documents
from onnxprune.cli import pages
from onnxprune.cli.options import Given, command, existing
from onnxprune.report import sensitivities
from onnxprune.report.console import Screen, plain


@command("sensitivity", model="MODEL.onnx")
def sensitivity(screen: Screen, given: Given) -> None:
    """Cut each group alone at several ratios, repair what reads it, and measure the whole model."""
    import onnxprune as op  # the heavy imports wait until the arguments are known to be good

    existing(given.model, "model")
    given.check_together()
    given.check_recovery()
    pages.check(given.model, given.output, given.html)
    arguments = {**given.arguments, "jobs": given.jobs or -1}
    with screen.progress() as progress:
        found = op.sensitivity(given.model, **arguments, progress=progress)
    facts = plain(asdict(found))
    if given.output is not None:
        found.save(given.output)
    if given.html is not None:
        documents.write(given.html, sensitivities.page(facts, given.model.name))
    paths = [path for path in (given.output, given.html) if path is not None]
    screen.wrote.extend(paths)
    written = [Text.assemble(("wrote     ", "bold"), str(path)) for path in paths]
    if screen.as_json:
        screen.emit({**facts, "model": str(given.model)})
    screen.show(*sensitivities.render(facts, name_width=screen.name_width, every=screen.verbosity > 0), *written)
