"""Chooses the implementation of the ops for each device. No other file decides this.

The environment variable ``FASTSHAPE_BACKEND`` is read once, at import:

- ``auto`` (default): compiled kernels. Without them, Triton on a GPU and the reference elsewhere, with a reason.
- ``native``: compiled kernels on the CPU and, if a CUDA GPU is visible, on CUDA.
- ``triton``: Triton on the GPU; the CPU as with ``auto``. With TRITON_INTERPRET=1, Triton's interpreter on the CPU.
- ``reference``: plain PyTorch everywhere.

An explicit choice that is not available raises an error with the reason.
"""

from __future__ import annotations

import os
import warnings

import torch

from . import cuda, library, native, reference, triton

CHOICES = ("auto", "native", "triton", "reference")

_REQUESTED = "requested by FASTSHAPE_BACKEND"
_LOADED = "compiled kernels are loaded"
_STALE = "are not those of the sources in csrc"
_NATIVE = {"cpu": native, "cuda": cuda}
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}  # device type: dispatch key

_requested = ""
_chosen: dict[str, tuple[str, str]] = {}  # device type: backend, reason


def choose() -> None:
    """Register the implementations for this process. The import of fastshape calls it once.

    Raises:
        ValueError: FASTSHAPE_BACKEND is not one of `CHOICES`.
        RuntimeError: the requested backend is not available; the message gives the reason.
    """
    global _requested
    _requested = os.environ.get("FASTSHAPE_BACKEND", "auto")
    if _requested not in CHOICES:
        raise ValueError(f"FASTSHAPE_BACKEND={_requested!r}: allowed are {', '.join(CHOICES)}")
    if _requested == "triton":
        _require_triton()

    # The reference serves every device. A backend that is registered for one device takes precedence there.
    reference.register()
    _chosen["cpu"] = _for_cpu()
    _chosen["cuda"] = _for_cuda()
    if torch.xpu._is_compiled():
        _chosen["xpu"] = _for_xpu()
    for device, (backend, _) in _chosen.items():
        if backend == "triton":
            triton.register(_KEYS[device])
        elif backend == "native":
            _NATIVE[device].register()
    _chosen["other_devices"] = (
        "reference",
        _REQUESTED if _requested == "reference" else "no kernels for these devices",
    )
    _warn()


def _warn() -> None:
    """Warn where fastshape has other kernels than its user expects."""
    backends = {device: backend for device, (backend, _) in _chosen.items()}
    stale = [d for d, backend in backends.items() if backend == "native" and _NATIVE[d].is_stale()]
    if stale:
        warnings.warn(
            f"fastshape in {library.PACKAGE}: the compiled kernels for {' and '.join(stale)} {_STALE}; build them again "
            f"with: {library.REMEDY}",
            stacklevel=4,  # the import of fastshape
        )
    if backends["cpu"] == "reference" != _requested and library.shadowed():
        warnings.warn(f"fastshape runs on its slow reference: {_chosen['cpu'][1]}", stacklevel=4)


def _loaded(device: str) -> str:
    return f"{_LOADED}, but {_STALE}" if _NATIVE[device].is_stale() else _LOADED


def _require_triton() -> None:
    if problem := triton.error():
        raise RuntimeError(f"FASTSHAPE_BACKEND=triton: {problem}")
    if not (triton.interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        raise RuntimeError(
            "FASTSHAPE_BACKEND=triton: no GPU is visible, and on a CPU Triton runs only interpreted; "
            "set TRITON_INTERPRET=1 for that (slow, meant for tests), or use auto, native or reference"
        )


def _for_cpu() -> tuple[str, str]:
    if _requested == "reference":
        return "reference", _REQUESTED
    if _requested == "triton" and triton.interpreted():
        return "triton", "requested by FASTSHAPE_BACKEND, interpreted (TRITON_INTERPRET)"
    problem = native.error()
    if problem is None:
        return "native", _loaded("cpu")
    if _requested == "native":
        raise RuntimeError(f"FASTSHAPE_BACKEND=native: {problem}")
    return "reference", problem


def _for_cuda() -> tuple[str, str]:
    if _requested == "reference":
        return "reference", _REQUESTED
    # For torch, AMD GPUs are CUDA devices. Do not ask whether a GPU is visible unless it matters: the question starts the driver,
    # and processes that are forked afterwards cannot use it.
    if not (torch.version.cuda or torch.version.hip):
        return "reference", "this torch has neither CUDA nor ROCm"
    if _requested == "triton":
        return "triton", _REQUESTED
    problem = cuda.error()
    if problem is None:
        return "native", _loaded("cuda")
    if _requested == "native":
        if torch.version.cuda and torch.cuda.is_available():
            raise RuntimeError(f"FASTSHAPE_BACKEND=native: {problem}")
        return "reference", problem
    return _triton_or_reference(problem)


def _for_xpu() -> tuple[str, str]:
    if _requested == "reference":
        return "reference", _REQUESTED
    if _requested == "triton":
        return "triton", _REQUESTED
    problem = "there are no compiled kernels for XPU"
    return ("reference", problem) if _requested == "native" else _triton_or_reference(problem)


def _triton_or_reference(problem: str) -> tuple[str, str]:
    if missing := triton.error():
        return "reference", f"{problem}; {missing}"
    return "triton", problem


def backend_info() -> dict:
    """What is built, loaded and chosen, and why.

    Returns:
        dict with ``requested``, the value of FASTSHAPE_BACKEND; ``cpu``, ``cuda``, ``xpu`` (if torch has it) and
        ``other_devices``, the backend of each; ``reasons``, the reason for each backend, by the same names; ``reason``, the
        reason for the CPU's; ``native``, ``native_cuda`` and ``triton``, their build facts or the error that prevents their
        use; ``torch``, its version; and ``threads``, the number of CPU threads.

    Example:
        >>> fastshape.backend_info()["cpu"] in ("native", "reference")
        True
    """
    return {
        "requested": _requested,
        **{device: backend for device, (backend, _) in _chosen.items()},
        "reasons": {device: reason for device, (_, reason) in _chosen.items()},
        "reason": _chosen["cpu"][1],
        "native": native.facts(),
        "native_cuda": cuda.facts(),
        "triton": triton.facts(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
