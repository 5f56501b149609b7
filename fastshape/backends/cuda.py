"""The compiled CUDA kernels, fastshape._C_cuda. That they are missing never breaks an import: the error is kept."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path

import torch

_BUILD = (
    "build them with: pip install -U setuptools pybind11 ninja && "
    "FASTSHAPE_CUDA=1 pip install --no-build-isolation -e ."
)


def _build_facts() -> dict:
    """What setup.py decided about CUDA and why; empty where no kernels were built at all."""
    path = Path(__file__).parent.parent / "_build_facts.json"
    return json.loads(path.read_text())["cuda"] if path.is_file() else {}


def mismatch(torch_cuda: str | None, facts: dict) -> str | None:
    """Why kernels built like `facts` cannot run with a torch of this CUDA version, or None.

    Args:
        torch_cuda: ``torch.version.cuda``.
        facts: ``built``, ``reason`` and, where built, the CUDA ``version`` of nvcc.
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
    """(module, None), or (None, why there is none and what to do)."""
    problem = mismatch(torch.version.cuda, _build_facts())
    if problem is not None:
        return None, problem
    try:
        return importlib.import_module("fastshape._C_cuda"), None
    except ImportError as error:
        return None, f"the CUDA kernels did not load: {error}; {_BUILD}"


def error() -> str | None:
    """Why the kernels cannot be used, or None. No GPU is needed to use them: only to call them."""
    return _load()[1]


def register() -> None:
    """Give torch the CUDA kernels. Only where `error` is None."""
    _load()[0].register_ops()


def facts() -> dict:
    """Build facts of the loaded file, or ``{"error": why there is none}``."""
    module, problem = _load()
    return {"error": problem} if module is None else module.build_facts()
