"""A picture of a claim: means over seeds with standard errors, and every seed as a dot."""

import textwrap

from matplotlib.figure import Figure

from bitkern import files

WIDTH = 88  # letters in a line of a picture


def draw(path, claim):
    """Draw what :func:`benchmarks.claims.report.summary` says of a claim."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    columns = list(dict.fromkeys(cell["column"] for cell in claim["cells"]))
    rows = list(dict.fromkeys(cell["row"] for cell in claim["cells"]))
    for i, row in enumerate(rows):
        # Beside each other, so that rows that agree do not hide one another.
        shift = 0.3 * ((i + 0.5) / len(rows) - 0.5)
        cells = [cell for cell in claim["cells"] if cell["row"] == row and cell["values"]]
        places = [columns.index(cell["column"]) + shift for cell in cells]
        means = [cell["estimate"]["mean"] for cell in cells]
        errors = [cell["estimate"]["error"] or 0.0 for cell in cells]
        # Lines join what is ordered: numbers.
        line = "-" if all(column.isdecimal() for column in columns) else ""
        style = {"marker": "o", "linestyle": line, "capsize": 4, "color": f"C{i}", "label": row}
        axes.errorbar(places, means, errors, **style)
        for place, cell in zip(places, cells, strict=True):
            values = cell["values"].values()
            axes.plot([place + 0.03] * len(values), values, ".", color=f"C{i}", alpha=0.4)
        for column in (c["column"] for c in claim["cells"] if c["row"] == row and c["failure"]):
            at = columns.index(column) + shift, 0.03
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "color": f"C{i}"}
            axes.annotate("fails", at, **place)
    labels = [textwrap.fill(column, WIDTH // len(columns)) for column in columns]
    axes.set_xticks(range(len(columns)), labels)
    axes.set(xlabel=claim["across"], ylabel=claim["metric"], xlim=(-0.5, len(columns) - 0.5))
    axes.grid(axis="y", alpha=0.3)
    beside = max(min(WIDTH // (max(map(len, rows)) + 6), len(rows), 3), 1)
    figure.legend(loc="outside upper center", ncols=beside)
    with files.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})
