"""Where pictures come from: matplotlib, imported only when one is drawn."""

from typing import Any

from ralmspec.retrievers.errors import MissingExtra


def figure_class() -> Any:
    """`matplotlib.figure.Figure`, which needs no screen. Raises `MissingExtra` where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the plot needs: pip install 'ralmspec[bench]'") from None
    return Figure
