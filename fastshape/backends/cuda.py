"""The compiled CUDA kernels, fastshape._C_cuda. If they are missing, the import succeeds and the error is kept."""

from __future__ import annotations

import functools
import json

import torch

from . import library

_BUILD = (
    "build them with: pip install -U setuptools pybind11 ninja && "
    "FASTSHAPE_CUDA=1 pip install --no-build-isolation -e ."
)


def _build_facts() -> dict:
    """The decision of setup.py about CUDA and its reason; empty if no kernels were built."""
    path = library.PACKAGE / "_build_facts.json"
    return json.loads(path.read_text("utf-8"))["cuda"] if path.is_file() else {}


def mismatch(torch_cuda: str | None, facts: dict) -> str | None:
    """Why kernels with these build facts cannot run with a torch of this CUDA version, or None.

    Args:
        torch_cuda: ``torch.version.cuda``.
        facts: ``built``, ``reason`` and, if built, ``version``, the CUDA version of nvcc.
    """
    if torch_cuda is None:
        return "this torch has no CUDA"
    if not facts:
        return f"the CUDA kernels are not built; {_BUILD}"
    if not facts["built"]:
        return f"the CUDA kernels are not built ({facts['reason']}); {_BUILD}"
    if facts["version"].split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"the CUDA kernels were built for CUDA {facts['version']}, this torch has CUDA {torch_cuda}: "
            f"the majors must be equal; {_BUILD}"
        )
    return None


@functools.cache
def _load():
    """(module, None), or (None, the error and the remedy)."""
    try:
        problem = mismatch(torch.version.cuda, _build_facts())
    except Exception as error:  # a damaged file may hold anything
        return None, f"_build_facts.json is damaged ({type(error).__name__}: {error}); {_BUILD}"
    if problem is not None:
        return None, problem
    try:
        return library.load("_C_cuda"), None
    except ImportError as error:
        return None, f"the CUDA kernels did not load: {error}; {_BUILD}"


def error() -> str | None:
    """Why the kernels cannot be used, or None. They load without a GPU; only a call needs one."""
    return _load()[1]


def is_stale() -> bool:
    """Whether the kernels were not built from the sources beside the package. Call it only if `error` is None."""
    return library.is_stale(_load()[0])


def register() -> None:
    """Register the CUDA kernels with torch. Call it only if `error` is None."""
    _load()[0].register_ops()


def facts() -> dict:
    """The build facts of the loaded library, or ``{"error": the reason}``."""
    module, problem = _load()
    return {"error": problem} if module is None else module.build_facts()
