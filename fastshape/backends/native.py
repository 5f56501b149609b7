"""The compiled CPU kernels, fastshape._C. If they are missing, the import succeeds and the error is kept."""

from __future__ import annotations

import functools

from . import library


@functools.cache
def _load():
    """(module, None), or (None, the error and the remedy)."""
    try:
        return library.load("_C"), None
    except ModuleNotFoundError as error:
        if error.name != "fastshape._C":
            return None, f"the compiled kernels did not load: {error}"
        if other := library.shadowed():
            return None, (
                f"fastshape was imported from {library.PACKAGE}, where no compiled kernels are built. Those of "
                f"{other} are not used: start Python in another folder to import that fastshape, or build these "
                f"with: {library.REMEDY}"
            )
        return None, (
            "the compiled kernels are not built (FASTSHAPE_SKIP_EXT=1, or a source tree that was not installed); "
            f"build them with: {library.REMEDY}"
        )
    except ImportError as error:
        return None, (
            f"the compiled kernels did not load: {error}; build them again with: {library.REMEDY}"
        )


def error() -> str | None:
    """Why the kernels cannot be used, or None."""
    return _load()[1]


def is_stale() -> bool:
    """Whether the kernels were not built from the sources beside the package. Call it only if `error` is None."""
    return library.is_stale(_load()[0])


def register() -> None:
    """Register the CPU kernels with torch. Call it only if `error` is None."""
    _load()[0].register_ops()


def facts() -> dict:
    """The build facts of the loaded library, or ``{"error": the reason}``."""
    module, problem = _load()
    return {"error": problem} if module is None else module.build_facts()
