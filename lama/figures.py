"""Pictures by matplotlib, which the extra `plots` brings: made without a screen, the same bytes each time."""

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from lama.errors import LamaError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("png", "svg")


def make_figure(what: str, **options: Any) -> "Figure":
    """An empty figure, `options` being matplotlib's. Raises LamaError, naming `what` was to be drawn, where that is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen and remembers every figure
    except ImportError:
        raise _missing(what) from None
    return Figure(**options)


def check_installed(what: str) -> None:
    """Raises LamaError as `make_figure` does, before there is anything to draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise _missing(what)


def _missing(what: str) -> LamaError:
    return LamaError(f"{what} must be drawn by matplotlib; got no such package. Run: pip install matplotlib")


def render(figure: "Figure", kind: str = "png", **options: Any) -> bytes:
    """The figure as a file of that kind, with neither the time nor a version in it. Raises ValueError."""
    import matplotlib

    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lama"}):
        figure.savefig(picture, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None, "Creator": None}, **options)
    return picture.getvalue()
