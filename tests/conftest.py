"""What every test shares: rule bugs surface, and property tests draw the same examples on every machine."""

from __future__ import annotations

import os
from collections.abc import Generator

import onnxruntime
import pytest
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits

from onnxprune import devices

NIGHTLY = 50
"""How many times as many examples the profile "nightly" draws, HYPOTHESIS_PROFILE=nightly, from random seeds."""
_PATIENT = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]

settings.register_profile("suite", derandomize=True, deadline=None, max_examples=6, suppress_health_check=_PATIENT)
settings.register_profile(
    "nightly", derandomize=False, deadline=None, max_examples=6 * NIGHTLY, suppress_health_check=_PATIENT
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for a number of examples of their own ask for the suite's: in a nightly run they get more too."""
    if settings.get_current_profile_name() != "nightly":
        return
    seen: set[int] = set()
    for item in items:
        test = getattr(item, "obj", None)
        own = getattr(test, "_hypothesis_internal_use_settings", None)
        if own is not None and own.max_examples < 6 * NIGHTLY and id(test) not in seen:
            seen.add(id(test))
            test._hypothesis_internal_use_settings = settings(own, max_examples=own.max_examples * NIGHTLY)


NEWEST_TRIED = (1, 32)
"""From this onnxruntime on, every operator that the tests run has a kernel."""
UNSUPPORTED = (
    "has no kernel for operator",
    "is not a registered function/op",
    "support for models stamped with official released onnx opset versions",
    "Unsupported model IR version",
    "Only 4b",  # MatMulNBits of other bits
    "Unrecognized attribute: bits for operator GatherBlockQuantized",
    "Type 'tensor(float)' of input parameter (tanh_3) of operator (QMoE)",
)


def is_unsupported(error: BaseException | None) -> bool:
    """Whether an older onnxruntime refuses a model for what it does not know yet."""
    if error is None or not is_old():
        return False
    if any(text in str(error) for text in UNSUPPORTED):
        return True
    return is_unsupported(error.__cause__ or error.__context__)


def is_old() -> bool:
    """Whether the installed onnxruntime is older than the newest tried."""
    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < NEWEST_TRIED


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test at whose models an older onnxruntime is wrong or ends the process."""
    if item.get_closest_marker("newest_runtime") and is_old():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} does not run the models of this test rightly")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip a test whose operators are newer than the installed onnxruntime."""
    try:
        return (yield)
    except Exception as error:
        if is_unsupported(error):
            pytest.skip(f"onnxruntime {onnxruntime.__version__} does not know an operator of this test")
        raise


@pytest.fixture(scope="session", autouse=True)
def any_count_is_fast() -> Generator[None]:
    """Cuts are the same on every machine: the one that runs the tests likes any number of channels."""
    plain = devices.Kernels("plain", *[1] * len(devices.MULTIPLES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "this_machine", lambda: plain)
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "newest_runtime: an older onnxruntime is wrong or crashes on these models")
    config.addinivalue_line("markers", "dense: a sample with many positions counts for more, as for users")
    config.addinivalue_line("markers", "lenient: a rule that raises freezes its node, as for users")


@pytest.fixture(scope="session", autouse=True)
def one_core_per_worker() -> Generator[None]:
    """Where several workers share the cores, threads of numpy's products would only wait for each other."""
    with threadpool_limits(limits=1 if "PYTEST_XDIST_WORKER" in os.environ else None, user_api="blas"):
        yield


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that raises is a bug; outside tests it only costs compression."""
    monkeypatch.setattr("onnxprune.channels.propagate.STRICT", request.node.get_closest_marker("lenient") is None)


@pytest.fixture(autouse=True)
def _samples_count_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the closed form have a few samples of many positions: no training begins on these unasked."""
    if request.node.get_closest_marker("dense") is None:
        monkeypatch.setattr("onnxprune.passes.training_sizes._MOST_ANSWERS", 1)


@pytest.fixture(autouse=True)
def _every_gain_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests train small models that have lost next to nothing, and ask whether less is lost then."""
    monkeypatch.setattr("onnxprune.passes.training._LEAST_GAIN", 0.0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times are kept in the user's cache folder: not that of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
