"""Measure the sensitivity of every group on a Dask or a Ray cluster, through joblib.

python examples/cluster_sensitivity.py dask [ADDRESS]    needs distributed; without an address a local cluster
python examples/cluster_sensitivity.py ray [ADDRESS]     needs ray
python examples/cluster_sensitivity.py                   threads of this process

Paths of the model and the data have to mean the same on all machines.
"""

from __future__ import annotations

import sys
from pathlib import Path

import joblib

import onnxprune as op

MODELS = Path(__file__).resolve().parent.parent / "models"


def connect(kind: str, address: str | None) -> str:
    """Connect to a cluster, and return the name of joblib's backend.

    Raises:
        SystemExit: the package is not installed.
    """
    if kind == "threads":
        return "threading"
    try:
        if kind == "dask":
            from distributed import Client

            Client(address) if address else Client(n_workers=2, threads_per_worker=1)
        else:
            import ray
            from ray.util.joblib import register_ray

            ray.init(address=address)
            register_ray()
    except ImportError as error:
        package = {"dask": "distributed"}.get(kind, "ray")
        raise SystemExit(f"This recipe needs {package}: pip install {package} ({error})") from None
    return kind


def main() -> None:
    """Measure, save, and list the most sensitive groups."""
    kind, address = (*sys.argv[1:], None, None)[:2]
    with joblib.parallel_config(backend=connect(kind or "threads", address), n_jobs=2):
        curves = op.sensitivity(
            MODELS / "recurrent.onnx", data=MODELS / "digits_calibration.npz", samples=48, ratios=(0.5,)
        )
    if kind:
        curves.save("sensitivity.json")  # for op.prune(..., sensitivity="sensitivity.json")
    print(f"{len(curves.curves)} groups measured")


if __name__ == "__main__":
    main()
