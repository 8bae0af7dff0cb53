"""Statistics of feature maps under their public name.

Add your own with :func:`register`, see CONTRIBUTING.
"""

from onnxprune.importance.statistics import Maps, Means, NotFinite, Statistic, get, names, register, unregister

__all__ = ["Maps", "Means", "NotFinite", "Statistic", "get", "names", "register", "unregister"]


def __dir__() -> list[str]:
    return [*__all__]
