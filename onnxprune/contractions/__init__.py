"""Contractions as matrix products: columns of the data times a matrix of the weight. Arrays only, no onnx here."""

from onnxprune.contractions.form import Form, Picked
from onnxprune.contractions.pairwise import Blocks, Pairwise
from onnxprune.contractions.sampling import pick, rows_per_sample
from onnxprune.contractions.scale import Scale
from onnxprune.contractions.windows import Transposed, Windows

__all__ = ["Blocks", "Form", "Pairwise", "Picked", "Scale", "Transposed", "Windows", "pick", "rows_per_sample"]
