"""Device fixture and a time limit for every test: a hang is a failure."""

from __future__ import annotations

import faulthandler
import os

# Before torch starts its threads: idle ones must sleep, or tiny ops crawl where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402  (after OMP_WAIT_POLICY, as the three below)
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from cases import (
    BACKENDS,
    CUDA_BACKENDS,
    FORCE_BACKEND,
    backend_id,
    backend_marks,
    cuda_only,
    device_of,
)  # noqa: E402  (after OMP_WAIT_POLICY)

TIMEOUT_S = 120
SLOW_TIMEOUT_S = 900

# CI runs the same examples every time; ATTNSIEVE_FUZZ=N draws N fresh ones.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.register_profile(
    "random",
    deadline=None,
    max_examples=int(os.environ.get("ATTNSIEVE_FUZZ", "0")) or 1,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.load_profile("random" if "ATTNSIEVE_FUZZ" in os.environ else "ci")


def _backend_params(backends) -> list:
    return [pytest.param(b, marks=backend_marks(b), id=backend_id(b)) for b in backends]


@pytest.fixture(params=_backend_params(BACKENDS))
def device(request) -> str:
    """The CPU, and the GPU once for each kernel family (forced by `_forced_backend`)."""
    return device_of(request.param)


@pytest.fixture(params=_backend_params(CUDA_BACKENDS))
def cuda_backend(request) -> str:
    """For tests that only run on a GPU: the name of the forced kernel family."""
    return request.param


def _named_backends(item) -> list[str | None]:
    """What the parameters of a test say about its backend."""
    chosen = getattr(getattr(item, "callspec", None), "params", {})
    named = [chosen.get("device"), chosen.get("cuda_backend")]
    return [*named, getattr(chosen.get("case"), "backend", None)]


@pytest.fixture(autouse=True)
def _forced_backend(request, monkeypatch):
    """Makes the library take the backend that the test's parameters name."""
    for backend in _named_backends(request.node):
        if backend in CUDA_BACKENDS:
            monkeypatch.setenv(FORCE_BACKEND, backend)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """pytest-timeout where it is installed, otherwise a traceback and the end of the process."""
    if item.config.pluginmanager.hasplugin("timeout"):
        return (yield)
    slow = item.get_closest_marker("slow") is not None
    faulthandler.dump_traceback_later(SLOW_TIMEOUT_S if slow else TIMEOUT_S, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _needs_gpu(item) -> bool:
    reasons = [mark.kwargs.get("reason") for mark in item.iter_markers("skipif")]
    return (
        bool(set(_named_backends(item)) & set(CUDA_BACKENDS))
        or cuda_only.kwargs["reason"] in reasons
    )


@pytest.hookimpl(tryfirst=True)  # before -k chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if _needs_gpu(item):
            item.add_marker("cuda")  # so that -k cuda finds what needs a GPU, whatever its name
        if item.config.pluginmanager.hasplugin("timeout"):
            slow = item.get_closest_marker("slow") is not None
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S if slow else TIMEOUT_S))


def pytest_configure(config):
    slow = "slow: long or memory-hungry, deselected by default"
    for marker in (slow, "model: needs a model", "cuda: needs a CUDA GPU"):
        config.addinivalue_line("markers", marker)


@pytest.fixture(autouse=True)
def _plain_torch_state():
    """Tests that change a global setting get it put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
