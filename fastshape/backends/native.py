"""The compiled CPU kernels, fastshape._C. If they are missing, the import succeeds and the error is kept."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def _load():
    """(module, None), or (None, the error and the remedy)."""
    try:
        return importlib.import_module("fastshape._C"), None
    except ModuleNotFoundError as error:
        if error.name != "fastshape._C":
            return None, f"the compiled kernels did not load: {error}"
        return None, (
            "the compiled kernels are not built (no compiler at installation, or FASTSHAPE_SKIP_EXT=1); "
            "build them with: pip install -U setuptools pybind11 ninja && pip install --no-build-isolation -e ."
        )
    except ImportError as error:
        return None, (
            f"the compiled kernels did not load: {error}; "
            "build them again with: pip install -U setuptools pybind11 ninja && pip install --no-build-isolation -e ."
        )


def error() -> str | None:
    """Why the kernels cannot be used, or None."""
    return _load()[1]


def register() -> None:
    """Register the CPU kernels with torch. Call it only if `error` is None."""
    _load()[0].register_ops()


def facts() -> dict:
    """The build facts of the loaded library, or ``{"error": the reason}``."""
    module, problem = _load()
    return {"error": problem} if module is None else module.build_facts()
