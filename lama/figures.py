"""Figures drawn by matplotlib (the extra `plots`): without a screen, and with the same bytes each time."""

import importlib.util
import io
from typing import TYPE_CHECKING, Literal

from lama.errors import LamaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE_FORMATS = ("png", "svg")


def make_figure(
    what: str,
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    layout: Literal["constrained"] | None = None,
) -> "Figure":
    """An empty figure. Raises LamaError, naming `what`, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # pyplot would look for a screen and hold every figure
    except ImportError:
        raise _missing(what) from None
    return Figure(figsize=figsize, dpi=dpi, layout=layout)


def is_installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def check_installed(what: str) -> None:
    """Raise LamaError as `make_figure` would, before the work begins."""
    if not is_installed():
        raise _missing(what)


def _missing(what: str) -> LamaError:
    return LamaError(f"matplotlib, which draws {what}, is not installed. Run: pip install matplotlib")


def render(figure: "Figure", kind: str = "png", transparent: bool = False, **options: float | str) -> bytes:
    """The bytes of the figure without time or version. Raises ValueError for an unknown kind."""
    import matplotlib

    if kind not in IMAGE_FORMATS:
        raise ValueError(f"kind must be one of {', '.join(IMAGE_FORMATS)}; got {kind!r}")
    picture = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "lama"}):
        figure.savefig(picture, format=kind, metadata=metadata, transparent=transparent, **options)
    return picture.getvalue()
