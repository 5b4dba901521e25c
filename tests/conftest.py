"""Settings for every test, and what no test may leave behind."""

import gc
import importlib.util
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before torch is imported anywhere, and inherited by every subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# When they are imported, and by pytest.
SET_BY_PACKAGES = (
    "HYDRA_FULL_ERROR",
    "KMP_",
    "LD_LIBRARY_PATH",
    "PYTEST_CURRENT_TEST",
    "QT_QPA_",
    "TORCHINDUCTOR_",
    "_TORCHINDUCTOR_",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the numerical tests run with a second time, and how long things are tried at random."""
    parser.addoption(
        "--long", action="store_true", help="the long form of faults and fuzz, which takes hours"
    )
    parser.addoption(
        "--no-compiled-loss",
        action="store_true",
        help="compute the loss in chunks, as without a C compiler (not in processes of their own)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Leave seeds to `independent`, whatever the order; hear Ctrl-C, also where the shell has it ignored."""
    config.option.randomly_reset_seed = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; tests send Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.no_compiled_loss:
        from lskd.kernel import native as _compiled

        _compiled.function = lambda: None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what the tests import out of every later collection of garbage; mmengine asks for two a run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that run real commands first, in the order that chance gave: a long one is no tail."""
    long = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in long)


def shared_state() -> dict[str, Any]:
    """Return what the tests of one process share, by name."""
    umask = os.umask(0o022)
    os.umask(umask)
    root = logging.getLogger()
    state = {
        "working directory": os.getcwd(),
        "environment": {
            name: os.environ[name] for name in os.environ if not name.startswith(SET_BY_PACKAGES)
        },
        "umask": umask,
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "root logger": (root.level, root.manager.disable),
        "handlers of the root logger": [
            h for h in root.handlers if not type(h).__module__.startswith("_pytest")
        ],
        "numpy's handling of errors": np.geterr(),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch.distributed": torch.distributed.is_initialized(),
    }
    if "matplotlib" in sys.modules:
        state["matplotlib's rcParams"] = dict(sys.modules["matplotlib"].rcParams)
    return state


@pytest.fixture(autouse=True)
def independent() -> Iterator[None]:
    """Start each test from the same seeds, in any order, and fail one that changes what the next will see."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before, modules, path, hook = shared_state(), dict(sys.modules), list(sys.path), sys.excepthook
    allowed = set(torch.serialization.get_safe_globals())
    yield
    sys.excepthook = hook  # typer's and torch.distributed's stay otherwise
    # At its end torch's safe_globals() forgets what had been allowed before it, too.
    torch.serialization.add_safe_globals(list(allowed - set(torch.serialization.get_safe_globals())))
    after = shared_state()
    left = [name for name, value in before.items() if after[name] != value]
    left += [f"module {name}" for name, module in modules.items() if sys.modules.get(name) is not module]
    # Packages append to these when they are imported.
    left += ["sys.path"] * (sys.path[: len(path)] != path)
    assert not left, f"the test has changed, for all that follow it: {', '.join(left)}"


@pytest.fixture(scope="session")
def compile_source() -> Callable[[Path, Path], str]:
    """The build's own function that compiles a source file, and returns why it could not."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc)")
    found = importlib.util.spec_from_file_location(
        "hatch_build", Path(__file__).parents[1] / "hatch_build.py"
    )
    hook = importlib.util.module_from_spec(found)
    found.loader.exec_module(hook)
    return hook.compile_source


@pytest.fixture
def without_float64(monkeypatch):
    """A context that treats the processor as a device without float64, as Apple's MPS is one.

    ``lskd`` believes it of the processor for the whole test; within the context every operation that would
    make such a tensor raises.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from lskd.base import tensors as _devices

    class WithoutFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                    raise TypeError(f"this device has no float64, asked for by {function}")
            return result

    monkeypatch.setattr(_devices, "_WITHOUT_FLOAT64", {"cpu"})
    return WithoutFloat64
