"""Which implementation serves the ops: the only place where that is decided.

``FASTSHAPE_BACKEND`` is read once, at import: ``auto`` (default) takes the compiled kernels and falls
back to the reference with a reason; an explicit choice that cannot be had raises and says why.
"""

from __future__ import annotations

import os

import torch

from . import native, reference

CHOICES = ("auto", "native", "triton", "reference")

_info: dict = {}


def choose() -> None:
    """Register the implementations for this process. Called once, when fastshape is imported.

    Raises:
        ValueError: FASTSHAPE_BACKEND is not one of `CHOICES`.
        RuntimeError: the backend that was asked for cannot be had; the message says why.
    """
    requested = os.environ.get("FASTSHAPE_BACKEND", "auto")
    if requested not in CHOICES:
        raise ValueError(f"FASTSHAPE_BACKEND={requested!r}: allowed are {', '.join(CHOICES)}")
    if requested == "triton":
        raise RuntimeError(
            "FASTSHAPE_BACKEND=triton: this version has no Triton kernels; use auto, native or reference"
        )

    # The reference serves every device; a backend registered for one device goes before it there.
    reference.register()
    if requested == "reference":
        chosen, reason = "reference", "asked for by FASTSHAPE_BACKEND"
    elif native.error() is None:
        native.register()
        chosen = "native"
        reason = "compiled kernels are loaded"
    elif requested == "native":
        raise RuntimeError(f"FASTSHAPE_BACKEND=native: {native.error()}")
    else:
        chosen, reason = "reference", native.error()
    _info.update(requested=requested, cpu=chosen, reason=reason)


def backend_info() -> dict:
    """What is built, loaded and chosen, and why.

    Returns:
        dict with ``requested`` (FASTSHAPE_BACKEND), ``cpu`` and ``other_devices`` (the backend that
        serves them), ``reason``, ``native`` (build facts, or the error that kept it from loading),
        ``torch`` (its version) and ``threads``.
    """
    return {
        **_info,
        "other_devices": "reference",
        "native": native.facts(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
