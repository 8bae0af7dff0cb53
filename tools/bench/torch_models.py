"""torchvision's architectures, their ONNX files, and torch-pruning on them."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

SIZE = 224


def _torchvision() -> Any:
    """torchvision's models.

    Wheels are built for CUDA; beside a CPU build of torch their compiled operators are missing, and the import ends
    where it registers shapes for them. No architecture here uses one, so that step is left out.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        import torchvision
    return torchvision.models


def build(name: str) -> Any:
    """An architecture with random weights, in evaluation mode, on one thread."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return getattr(_torchvision(), name)(weights=None).eval()


def export(name: str, path: Path) -> None:
    """Write the architecture as ONNX (TorchScript exporter, opset 17, batch free)."""
    import torch

    torch.onnx.export(
        build(name),
        (torch.randn(2, 3, SIZE, SIZE),),
        str(path),
        opset_version=17,
        dynamo=False,
        input_names=["input"],
        dynamic_axes={"input": {0: "batch"}},
    )


def torch_pruning_seconds(name: str, ratio: float, repeats: int) -> dict[str, Any]:
    """Processor seconds of torch-pruning's graph build and of its prune step, and the share of parameters removed.

    Told what a careful user tells it: the classifier is ignored, attention has its heads.
    """
    import torch
    import torch_pruning as tp

    builds, steps, removed = [], [], 0.0
    for _ in range(repeats):
        model = build(name)
        before = sum(p.numel() for p in model.parameters())
        last = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
        heads = {m: m.num_heads for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}
        start = time.process_time()
        pruner = tp.pruner.MagnitudePruner(
            model,
            torch.randn(1, 3, SIZE, SIZE),
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=last,
            num_heads=heads,
        )
        middle = time.process_time()
        pruner.step()
        builds.append(middle - start)
        steps.append(time.process_time() - middle)
        removed = 1 - sum(p.numel() for p in model.parameters()) / before
    fastest = min(range(repeats), key=lambda i: builds[i] + steps[i])
    build_s, step_s = builds[fastest], steps[fastest]
    return {"build": build_s, "step": step_s, "seconds": build_s + step_s, "removed": removed}
