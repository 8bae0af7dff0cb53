"""Devices under their public name: the multiples of channels that their kernels like, for ``round_to="auto"``.

>>> import onnxprune as op
>>> op.devices.get("avx512").writes
16
>>> op.devices.register(op.devices.Kernels("mine", writes=32, reads=8))

Afterwards ``device="mine"``, and ``--device mine`` where a package announces it (entry point group
``onnxprune.devices``). A JSON file of the same names does as well: ``--device mine.json``.
"""

from onnxprune.allocation.rounding import Kernels, get, names, register, this_machine, unregister

__all__ = ["Kernels", "get", "names", "register", "this_machine", "unregister"]
