"""The compiled kernels, fastshape._C. That they are missing never breaks an import: the error is kept."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def _load():
    """(module, None), or (None, why there is none and what to do)."""
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
    """Give torch the CPU kernels. Only where `error` is None."""
    _load()[0].register_ops()


def facts() -> dict:
    """Build facts of the loaded file, or ``{"error": why there is none}``."""
    module, problem = _load()
    return {"error": problem} if module is None else module.build_facts()
