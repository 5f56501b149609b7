"""Which implementation serves the ops, device by device: the only place where that is decided.

``FASTSHAPE_BACKEND`` is read once, at import:

- ``auto`` (default): compiled kernels; where there are none, Triton on a GPU and the reference elsewhere, with a reason.
- ``native``: compiled kernels on the CPU and, where a CUDA GPU is visible, on CUDA.
- ``triton``: Triton on the GPU, the CPU as with ``auto``. With TRITON_INTERPRET=1, Triton's interpreter on the CPU too.
- ``reference``: plain PyTorch everywhere.

An explicit choice that cannot be had raises and says why.
"""

from __future__ import annotations

import os

import torch

from . import cuda, native, reference, triton

CHOICES = ("auto", "native", "triton", "reference")

_ASKED_FOR = "asked for by FASTSHAPE_BACKEND"
_LOADED = "compiled kernels are loaded"
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}  # device type: dispatch key

_requested = ""
_chosen: dict[str, tuple[str, str]] = {}  # device type: backend, reason


def choose() -> None:
    """Register the implementations for this process. Called once, when fastshape is imported.

    Raises:
        ValueError: FASTSHAPE_BACKEND is not one of `CHOICES`.
        RuntimeError: the backend that was asked for cannot be had; the message says why.
    """
    global _requested
    _requested = os.environ.get("FASTSHAPE_BACKEND", "auto")
    if _requested not in CHOICES:
        raise ValueError(f"FASTSHAPE_BACKEND={_requested!r}: allowed are {', '.join(CHOICES)}")
    if _requested == "triton":
        _require_triton()

    # The reference serves every device; a backend registered for one device goes before it there.
    reference.register()
    _chosen["cpu"] = _for_cpu()
    _chosen["cuda"] = _for_cuda()
    if torch.xpu._is_compiled():
        _chosen["xpu"] = _for_xpu()
    for device, (backend, _) in _chosen.items():
        if backend == "triton":
            triton.register(_KEYS[device])
        elif backend == "native":
            (native if device == "cpu" else cuda).register()
    _chosen["other_devices"] = (
        "reference",
        _ASKED_FOR if _requested == "reference" else "no kernels for them",
    )


def _require_triton() -> None:
    if problem := triton.error():
        raise RuntimeError(f"FASTSHAPE_BACKEND=triton: {problem}")
    if not (triton.interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        raise RuntimeError(
            "FASTSHAPE_BACKEND=triton: no GPU is visible, and on a CPU Triton only runs interpreted; "
            "set TRITON_INTERPRET=1 for that (slow, meant for tests), or use auto, native or reference"
        )


def _for_cpu() -> tuple[str, str]:
    if _requested == "reference":
        return "reference", _ASKED_FOR
    if _requested == "triton" and triton.interpreted():
        return "triton", "asked for by FASTSHAPE_BACKEND, interpreted (TRITON_INTERPRET)"
    problem = native.error()
    if problem is None:
        return "native", _LOADED
    if _requested == "native":
        raise RuntimeError(f"FASTSHAPE_BACKEND=native: {problem}")
    return "reference", problem


def _for_cuda() -> tuple[str, str]:
    if _requested == "reference":
        return "reference", _ASKED_FOR
    # AMD's GPUs are CUDA devices to torch. Whether one is visible is not asked where it does not matter: asking starts
    # the driver, and processes forked after that could not use it.
    if not (torch.version.cuda or torch.version.hip):
        return "reference", "this torch has neither CUDA nor ROCm"
    if _requested == "triton":
        return "triton", _ASKED_FOR
    problem = cuda.error()
    if problem is None:
        return "native", _LOADED
    if _requested == "native":
        if torch.version.cuda and torch.cuda.is_available():
            raise RuntimeError(f"FASTSHAPE_BACKEND=native: {problem}")
        return "reference", problem
    return _triton_or_reference(problem)


def _for_xpu() -> tuple[str, str]:
    if _requested == "reference":
        return "reference", _ASKED_FOR
    if _requested == "triton":
        return "triton", _ASKED_FOR
    problem = "there are no compiled kernels for XPU"
    return ("reference", problem) if _requested == "native" else _triton_or_reference(problem)


def _triton_or_reference(problem: str) -> tuple[str, str]:
    if missing := triton.error():
        return "reference", f"{problem}; {missing}"
    return "triton", problem


def backend_info() -> dict:
    """What is built, loaded and chosen, and why.

    Returns:
        dict with ``requested`` (FASTSHAPE_BACKEND); ``cpu``, ``cuda``, ``xpu`` (where torch has it) and
        ``other_devices``: the backend that serves them; ``reasons``: why, by the same names; ``reason``: that
        of the CPU; ``native``, ``native_cuda`` and ``triton``: build facts, or the error that keeps it from
        use; ``torch`` (its version) and ``threads``.
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
