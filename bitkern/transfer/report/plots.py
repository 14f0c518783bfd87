"""The plots of the page, as inline SVG, and thumbnails, as data URIs."""

import base64
import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitkern.text import one_line
from bitkern.transfer.curves import Record, plot_curves
from bitkern.transfer.data.decoders import read_image
from bitkern.transfer.data.images import DataError, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from scipy.sparse import csr_array

INK = "#0a0b0c"  # placeholder of the page's text colour, dark or light
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bitkern",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), INK),
}
BLUE, ORANGE = "#3b82c4", "#d9772b"
NUMBERED = 20  # most classes at which cells have numbers and axes names
CELLS = 250  # along a side of the plot; more classes share one
STEPS = 2000  # most steps of a curve
SMALLEST = 0.55  # relative width to which a plot shrinks on a narrow page before it scrolls
THUMBNAIL = 160  # pixels


def _svg(size: tuple[float, float], alt: str, draw: Callable[["Figure"], None]) -> str:
    """Call ``draw`` on a figure of (width, height) inches, and return it as an SVG element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings():
        # Browsers have the glyphs that matplotlib's fonts lack.
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=no_metadata)
    svg = written.getvalue()
    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor")
    # Numbered ids repeat in every figure, and nothing refers to them.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    least = f"min-width:{SMALLEST * size[0]:.2f}in"
    shown = f'<svg role="img" aria-label="{html.escape(alt)}" style="{least}" '
    return svg.replace("<svg ", shown, 1)


def confusion(matrix: "csr_array", support: npt.NDArray[np.int64], classes: Sequence[str]) -> str:
    """Plot the confusion matrix: rows are classes, columns predictions, colours shares."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    count = len(classes)
    found = matrix.tocoo()
    share = found.data / np.maximum(support, 1)[found.row]
    right = found.row == found.col
    layers = (("right", right, BLUE), ("wrong", ~right, ORANGE))
    few, block = count <= NUMBERED, -(-count // CELLS)
    side = -(-count // block)

    def largest(which: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Return the maximum of each block of cells."""
        blocks = np.zeros((side, side))
        np.maximum.at(blocks, (found.row[which] // block, found.col[which] // block), share[which])
        return blocks

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for name, which, colour in layers:
            # Empty cells are transparent, on a dark or light page.
            colours = LinearSegmentedColormap.from_list("share", [f"{colour}30", colour])
            options: dict[str, Any] = {"cmap": colours, "norm": PowerNorm(0.5, 0, 1)}
            cells = largest(which)
            if few:
                axes.pcolormesh(np.ma.masked_equal(cells, 0), **options)
            else:
                if name == "wrong":
                    np.fill_diagonal(cells, 0)  # blocks on the diagonal show right predictions
                cells = np.ma.masked_equal(cells, 0)
                end = block * len(cells) + 0.5
                extent = (0.5, end, end, 0.5)
                image = axes.imshow(cells, interpolation="none", extent=extent, **options)
                figure.colorbar(image, label=f"share of the class, {name}", shrink=0.5, pad=0.02)
        if few:
            for i, j, n in zip(found.row, found.col, found.data, strict=True):
                axes.text(j + 0.5, i + 0.5, str(n), ha="center", va="center")
            places = np.arange(count) + 0.5
            names = [one_line(name, 18) for name in classes]
            axes.set_xticks(places, names, rotation=90)
            axes.set_yticks(places, names)
            axes.tick_params(length=0)
            axes.invert_yaxis()
        axes.set(xlabel="predicted", ylabel="true", aspect="equal")

    size = (2 + 0.4 * count,) * 2 if few else (6.9, 5.6)
    return _svg(size, f"Confusion matrix of {count} classes", draw)


def calibration(bins: Sequence[Mapping[str, Any]]) -> str:
    """Plot the accuracy and the number of predictions by probability."""
    edges = np.linspace(0, 1, len(bins) + 1)
    filled = [(b["confidence"], b["accuracy"]) for b in bins if b["count"]]

    def draw(figure: "Figure") -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        heights = [b["accuracy"] or 0.0 for b in bins]
        upper.bar(edges[:-1], heights, edges[1], align="edge", color=BLUE, alpha=0.4)
        upper.plot([0, 1], [0, 1], "--", color=INK, linewidth=1)
        upper.plot(*zip(*filled, strict=True), "o-", color=BLUE)
        upper.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        lower.bar(edges[:-1], [b["count"] for b in bins], edges[1], align="edge", color=BLUE)
        lower.set(xlabel="probability", ylabel="count", yscale="symlog")
        lower.yaxis.set_major_formatter("{x:.0f}")

    return _svg((5, 4.5), "Calibration: probability against the share that is right", draw)


def curves(history: Sequence[Record]) -> str:
    """Plot the curves of a training, long ones with a subset of the steps."""
    losses = [record for record in history if "loss" in record]
    others = [record for record in history if "loss" not in record]
    some = losses[:: -(-len(losses) // STEPS) or 1]
    return _svg((6.9, 2.9), "Training curves", lambda figure: plot_curves(figure, some + others))


def thumbnail(source: Source) -> str | None:
    """Encode a small JPEG of an image as a data URI; None if it cannot be read."""
    jpeg = io.BytesIO()
    try:
        image = read_image(source)
    except DataError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(jpeg, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
