"""Statistics of feature maps, accumulated batch by batch in float64. Arrays only, no onnx here."""

from onnxprune.statistics import moments, products, spectra
from onnxprune.statistics.maps import Maps
from onnxprune.statistics.means import Means, NotFinite
from onnxprune.statistics.registry import Statistic, get, names, register, unregister

BUILT_IN = (moments, products, spectra)

__all__ = ["BUILT_IN", "Maps", "Means", "NotFinite", "Statistic", "get", "names", "register", "unregister"]
