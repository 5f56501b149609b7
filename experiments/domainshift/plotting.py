"""matplotlib, whatever backend the environment names, and whether or not there is a home folder.

A notebook names a backend for its child processes that is often not installed there, and matplotlib
then fails at its import. Figures here are drawn without a backend, so the name is hidden meanwhile.
Without a folder for its settings matplotlib says so and takes a temporary one, which serves as well.
"""

from __future__ import annotations

import logging
import os

_named = os.environ.pop("MPLBACKEND", None)
_logger = logging.getLogger("matplotlib")
_level = _logger.level
_logger.setLevel(logging.ERROR)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
finally:
    _logger.setLevel(_level)
    if _named is not None:
        os.environ["MPLBACKEND"] = _named

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "matplotlib"]
