"""matplotlib, whatever backend the environment names.

A notebook names one for its child processes that is often not installed there, and matplotlib then
fails at its import. Figures here are drawn without a backend, so the name is hidden meanwhile.
"""

from __future__ import annotations

import os

_named = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
finally:
    if _named is not None:
        os.environ["MPLBACKEND"] = _named

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "matplotlib"]
