"""Pictures of the documentation: ``python -m benchmarks.pictures docs/pictures`` writes them.

Figures come from ``benchmarks/results`` and from the tables of the pages. The SVG is written by
hand: the same inputs give the same bytes, and a text that does not fit raises ValueError. Letters
are large, for the width of a telephone.
"""

import argparse
import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 760
SHOWN = 0.7  # the share of WIDTH shown on a large screen: letters are sized for phones
MARGIN = 24
SIZE = 21  # of letters
INK, MUTED, LINE = "#1b2530", "#56616d", "#cfd6dd"
OURS, OURS_BOX, OURS_FIELD = "#0a7a72", "#dcf0ed", "#b5ddd8"
PEER, PEER_BOX = "#8b96a3", "#eceff3"
KEPT = "#d97a1e"
LETTER = 0.56  # mean width of a letter of the widest usual font, of its size; bold 0.62


class Drawing:
    """An SVG of a fixed width on a ground of its own."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        room: float | None = None,
        size: int = SIZE,
        fill: str = INK,
        bold: bool = False,
    ) -> None:
        """A line whose baseline is y; ``room`` is the width it has, by default up to the margin."""
        room = WIDTH - MARGIN - x if room is None else room
        needed = len(text) * size * (0.62 if bold else LETTER)
        if needed > room:
            raise ValueError(f"{text!r} needs {needed:.0f} of {room:.0f}")
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
            f'text-anchor="start"{weight}>{escape(text)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        line: str = "none",
        dashed: bool = False,
        round: float = 4,
    ) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round:g}" '
            f'fill="{fill}" stroke="{line}" stroke-width="2"{dash}/>'
        )

    def arrow(self, x: float, y: float, length: float) -> None:
        """Downwards."""
        tip = f"{x - 5:g},{y + length - 7:g} {x + 5:g},{y + length - 7:g} {x:g},{y + length:g}"
        self.parts.append(
            f'<path d="M{x:g} {y:g}v{length - 6:g}" stroke="{MUTED}" stroke-width="2"/>'
            f'<polygon points="{tip}" fill="{MUTED}"/>'
        )

    def save(self, path: Path, height: float, notes: Iterable[str]) -> None:
        """Write it, with notes in small lines below."""
        for line in notes:
            self.text(MARGIN, height, line, size=19, fill=MUTED)
            height += 28
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
            f'width="{SHOWN * WIDTH:g}" height="{SHOWN * height:g}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="{SIZE}" fill="{INK}">',
            f"<title>{escape(self.title)}</title>",
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2:g}" rx="12" '
            f'fill="#ffffff" stroke="{LINE}"/>',
        )
        path.write_text("\n".join([*head, *self.parts, "</svg>"]) + "\n")


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def release(measured: dict) -> str:
    """The release of PyTorch."""
    return measured["torch"].partition("+")[0]


def cells(page: str, first: str) -> list[str]:
    """The cells of a table's row on a page, without the first, by which it is found."""
    text = (ROOT / "docs" / page).read_text()
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", text, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def fusion(path: Path) -> None:
    """A pre-activation bottleneck, as PyTorch runs it and as bitkern does."""
    drawing = Drawing("A block of BiT in PyTorch and in bitkern")
    left, right, width = MARGIN, 396, 226
    step, full = 42, 88  # of rows; of the bar of a whole map

    def map_bar(x: float, y: float, part: float, again: bool = False) -> None:
        fill = "#ffffff" if again else KEPT
        drawing.box(x, y, full * part, 18, fill, line=KEPT, dashed=again)

    drawing.text(left, 46, "One block of BiT, forward", size=28, bold=True)
    drawing.text(left, 90, "PyTorch, step by step", bold=True, fill=MUTED, room=right - left)
    drawing.text(right, 90, "bitkern, fused", bold=True, fill=OURS)
    y = 108
    for number, (conv, part) in enumerate((("1x1", 1.0), ("3x3", 0.25), ("1x1", 0.25))):
        pairs = [
            ("GroupNorm", "GroupNorm" if number else "add + GroupNorm"),
            ("ReLU", "+ ReLU"),
            ("weight: 5 steps", "weight: ready"),
            (f"conv {conv}", f"conv {conv}"),
        ]
        if not number:
            drawing.box(left, y, width, 34, PEER_BOX)
            drawing.text(left + 12, y + 25, "add", room=width - 16)
            map_bar(left + width + 14, y + 8, part)
            y += step
            map_bar(right + width + 14, y + 8, part)
        drawing.box(right, y, width, 4 * step - 8, OURS_BOX, line=OURS, round=8)
        drawing.box(right + 1, y + 1, width - 2, 2 * step - 6, OURS_FIELD, round=7)
        for name, fused in pairs:
            drawing.box(left, y, width, 34, PEER_BOX)
            drawing.text(left + 12, y + 25, name, room=width - 16)
            drawing.text(right + 12, y + 25, fused, room=width - 16)
            for x in (left, right):
                if name == "ReLU":
                    map_bar(x + width + 14, y + 8, part, again=x == right)
                elif name.startswith("conv") and number < 2:
                    map_bar(x + width + 14, y + 8, 0.25)
            y += step
        y += 12
    drawing.box(right, 108, 340, 34, OURS_BOX, line=OURS, round=8)
    drawing.text(right + 12, 133, "all weights: one launch")
    map_bar(left, y + 10, 0.5)
    drawing.text(left + 56, y + 26, "kept for backward", room=right - left - 56)
    map_bar(right, y + 10, 0.5, again=True)
    drawing.text(right + 56, y + 26, "computed again")
    kept = cells("memory.md", "per element of the block's map")[-2:]
    for x, number, fill in zip((left, right), kept, (MUTED, OURS), strict=True):
        drawing.text(x, y + 76, f"{number} maps kept", size=30, bold=True, fill=fill, room=350)
    notes = (
        "A bar is a map: the block's channels, or a quarter of them.",
        "Dark: one operator. Frame: an autograd node, conv by PyTorch.",
        "What the last convolution returns, the next block adds.",
        "5 steps in BiT's code: var_mean, subtract, add, sqrt, divide.",
        "Both keep float32 statistics; weights are not drawn.",
    )
    drawing.save(path, y + 118, notes)


Bar = tuple[str, float, str, str]  # name, value, label, color


def draw_bars(drawing: Drawing, y: float, rows: list[Bar], x: float, width: float) -> float:
    """Bars from ``x`` on, the longest of ``width``; returns the next y."""
    most = max(value for _, value, _, _ in rows)
    for name, value, label, fill in rows:
        bold = fill == OURS
        drawing.text(MARGIN, y + 21, name, room=x - MARGIN, bold=bold)
        line = {OURS_BOX: OURS, PEER_BOX: PEER}.get(fill, "none")
        drawing.box(x, y + 4, max(width * value / most, 1), 22, fill, line=line, round=2)
        drawing.text(x + width * value / most + 10, y + 22, label, bold=bold, room=90)
        y += 32
    return y


WORDS = {
    "eager": "timm",
    "channels_last": "timm, channels_last",
    "amp": "timm, autocast",
    "bf16": "timm, pure bf16",
    "compile": "timm, compiled",
    "compile amp": "timm, autocast, compiled",
    "compile bf16": "timm, pure bf16, compiled",
    "batchnorm": "BatchNorm twin",
    "freezing": "timm, frozen",
    "freezing amp": "timm, autocast, frozen",
    "freezing bf16": "timm, pure bf16, frozen",
    "folded": "bitkern, folded",
    "folded freezing": "bitkern, frozen",
}


def speed_memory(path: Path) -> None:
    """Time and memory of R50x1 on a CPU against timm's."""
    measured = results("cpu_models.json")
    drawing = Drawing("Time and memory of BiT R50x1 on a CPU")
    drawing.text(MARGIN, 46, "BiT R50x1 on a CPU: bitkern and timm", size=28, bold=True)
    kinds = {"train_step": "Training step", "infer": "Inference"}
    y = 66.0
    for row in measured["rows"]:
        _, size, batch, dtype = row["case"].split("/")
        peers = row["peers_ms"]
        compiled = [n for n in peers if n in WORDS and n.startswith(("compile", "freezing"))]
        eager = [name for name in peers if name in ("eager", "channels_last", "amp", "bf16")]
        times = [("bitkern", row["ours_ms"], OURS)]
        times += [(WORDS[name], peers[name], OURS_BOX) for name in peers if "folded" in name]
        best = [min(names, key=lambda name: peers[name]) for names in (eager, compiled)]
        times += [(WORDS[name], peers[name], PEER) for name in best]
        times += [(WORDS["batchnorm"], peers["batchnorm"], PEER_BOX)]
        drawing.text(MARGIN, y + 24, f"{kinds[row['kind']]}, {dtype}, milliseconds", fill=MUTED)
        rows = [(name, ms, f"{ms:.0f}", fill) for name, ms, fill in times]
        y = draw_bars(drawing, y + 32, rows, 330, 320) + 12
    drawing.text(MARGIN, y + 24, "Kept for backward, bf16, MB", fill=MUTED)
    table = {
        "bitkern": ("bitkern", OURS),
        "timm's in pure bf16": (WORDS["bf16"], PEER),
        "timm's `resnetv2_50x1_bit` under autocast": (WORDS["amp"], PEER),
    }
    rows = []
    for first, (name, fill) in table.items():
        size_mb = float(cells("memory.md", first)[0])
        rows.append((name, size_mb, f"{size_mb:.0f}", fill))
    y = draw_bars(drawing, y + 32, rows, 330, 320)
    page = (ROOT / "docs" / "performance.md").read_text()
    processor = page.partition("## CPU\n")[2].partition(",")[0]
    notes = (
        f"{processor}, PyTorch {release(measured)},",
        f"{batch.removeprefix('bs')} images of {size} pixels. Of timm's ways the fastest,",
        "eager and compiled; frozen: compiled, with constant weights.",
        "The twin, eager, has BatchNorm and plain convolutions.",
        "Shorter is better. All rows: docs/performance.md",
    )
    drawing.save(path, y + 30, notes)


def loader(path: Path) -> None:
    """Images per second of the data loader and others."""
    measured = results("cpu_data.json")
    drawing = Drawing("Images per second of data loaders")
    drawing.text(MARGIN, 46, "Data loaders: images a second, 2 cores", size=28, bold=True)
    rows = {row["case"]: row for row in measured["rows"]}
    columns = {"first": (196, "first epoch"), "later": (470, "later epochs")}
    for x, title in columns.values():
        drawing.text(x, 84, title, fill=MUTED, room=260)
    y = 94.0
    for case in dict.fromkeys(name.rsplit("/", 2)[0] for name in rows):
        photo, crop = case.split("/")
        drawing.text(MARGIN, y + 24, f"JPEGs of {photo}, crops of {crop}", bold=True)
        for epoch, (x, _) in columns.items():
            row = rows[f"{case}/{epoch}/wall"]
            peers = dict(row["peers_ms"])
            times = [("bitkern", row["ours_ms"], OURS)]
            times += [("without cache", peers.pop("uncached"), OURS_BOX)]
            times += [(name, ms, PEER) for name, ms in peers.items()]
            shown = [
                (name if epoch == "first" else "", 1e3 / ms, f"{1e3 / ms:,.0f}", fill)
                for name, ms, fill in times
            ]
            bottom = draw_bars(drawing, y + 34, shown, x, 176)
        y = bottom + 14
    notes = (
        "bitkern decodes an image once and keeps it: later epochs read it.",
        f"PyTorch {release(measured)}. Each group has its scale. docs/performance.md",
    )
    drawing.save(path, y + 24, notes)


PARTS = (
    {"cli": "a file for each command"},
    {"demo": "on digits", "selftest": "of the kernels"},
    {"export": "runs for timm, transformers, ONNX, AOTInductor"},
    {"transfer": "trains, reports", "private": "by Opacus"},
    {"convert": "your networks", "models": "BiT, weights"},
    {"compile": "the backend of torch.compile, for whole networks"},
    {"nn": "layers; norm, activation, conv as one node"},
    {"optim": "SGD, in one pass with weight standardization"},
    {"ops": "checks, autograd, torch.library"},
    {"backends": "which one serves a call, and why: Triton, C++, CUDA"},
    {"reference": "the formulas", "csrc": "C++ and CUDA"},
)


def architecture(path: Path) -> None:
    """The parts of the package: each imports those below it."""
    step, height = 76, 54
    drawing = Drawing("The parts of bitkern")
    drawing.text(MARGIN, 46, "A part imports only parts below it", size=28, bold=True)
    whole = WIDTH - 2 * MARGIN
    for line, parts in enumerate(PARTS):
        y = 72 + line * step
        arrows = max(len(parts), len(PARTS[line - 1])) if line else 0
        for i in range(arrows):
            x = MARGIN + whole * (i + 0.5) / arrows
            drawing.arrow(x, y - step + height + 2, step - height - 4)
        width = (whole - 20 * (len(parts) - 1)) / len(parts)
        for i, (name, words) in enumerate(parts.items()):
            x = MARGIN + i * (width + 20)
            drawing.box(x, y, width, height, OURS_BOX, line=OURS, round=8)
            drawing.text(x + 14, y + 34, name, bold=True, room=130)
            drawing.text(x + 150, y + 34, words, size=19, fill=MUTED, room=width - 154)
    note = "csrc, compiled, is bitkern._C; it knows nothing of PyTorch."
    drawing.save(path, 72 + step * len(PARTS) + 12, [note])


PICTURES = {draw.__name__: draw for draw in (fusion, speed_memory, loader, architecture)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(out / f"{name}.svg")


if __name__ == "__main__":
    main()
