"""``python -m onnxprune`` runs the command where the script is not on the path."""

from onnxprune.cli.main import main

main(prog_name="onnxprune")
