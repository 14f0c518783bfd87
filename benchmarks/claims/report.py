"""Results of the runs: claims.json, and claims.md with a picture of each claim.

``python -m benchmarks.claims.report FILE.json DIR`` writes the page of a claims.json into DIR.
"""

import json
import sys
from pathlib import Path

from benchmarks.claims import CLAIMS, pictures, statistics
from benchmarks.claims.runs import FIRST_SEED
from bitkern import files

RESULTS, PAGE, PICTURES = "claims.json", "claims.md", "claims"
STATED = "title", "hypothesis", "setting", "metric", "across"


INTRODUCTION = """\
Do the claims of the BiT paper (arXiv 1912.11370) hold in this code, in networks small enough for \
two CPU cores? The networks have one bottleneck block per stage and take images of 32 pixels. They \
are trained on letters rendered from fonts, and for transfer on the handwritten digits of \
scikit-learn and of MNIST, for 80 to 1000 optimizer steps. The results say nothing about \
ImageNet, large networks or long trainings: a claim that is not seen here may hold there.

Hypotheses, metrics, seeds and the smallest effects of interest were committed before the runs. \
Learning rates were chosen on seed 100, the number of seeds on seeds 0 to 4, with weight decay on \
all parameters; these seeds are left out below. Seconds are wall time on two cores that other \
programs shared. Two more claims were undecided after all their seeds and are no longer run: that \
MixUp gains more with many examples than with few, and that sigmoids transfer better than a \
softmax from images with several labels.

Differences are paired by seed, with a 95 % confidence interval from Student's t. A gain is *seen* \
if the interval lies above zero and the mean is at least the smallest effect of interest, *not \
seen* if the interval excludes such a gain. Where the claim is that there is no loss, it is *seen* \
if the interval excludes a loss of that size. *Opposite seen* means a loss of that size; all \
else is *too uncertain to say*. An interval is *narrow enough* if half of it is no wider than the \
smallest effect of interest. Intervals are not corrected for the number of comparisons: the first \
comparison of each claim decides, the others are for information.

The runs: `python -m benchmarks.claims --out DIR` (PyTorch {torch}, commit {commit}). This page: \
`python -m benchmarks.claims.report benchmarks/results/claims.json docs`."""


def _values(cell, claim, lines):
    """Seed -> the number of a cell, where its run has one."""
    condition, number = claim.cells[cell]
    runs = [line for line in lines if line["condition"] == condition and "numbers" in line]
    return {line["seed"]: line["numbers"][number] for line in sorted(runs, key=lambda r: r["seed"])}


def _estimate(values):
    estimate = statistics.estimate(list(values))
    return estimate and estimate._asdict()


def differences(comparison, values):
    """Seed -> the comparison's difference, for the seeds of which all its cells have a number."""
    seeds = sorted(set.intersection(*(set(values[cell]) for _, cell in comparison.terms)))
    return {
        seed: sum(factor * values[cell][seed] for factor, cell in comparison.terms)
        for seed in seeds
    }


def _compared(comparison, values):
    found = differences(comparison, values)
    estimate = statistics.estimate(list(found.values()))
    return {
        "what": comparison.what,
        "smallest": comparison.smallest,
        "no_loss": comparison.no_loss,
        "values": found,
        "estimate": estimate and estimate._asdict() | {"least": estimate.least},
        "verdict": statistics.verdict(estimate, comparison.smallest, comparison.no_loss),
    }


def _summary(claim, lines):
    values = {cell: _values(cell, claim, lines) for cell in claim.cells}
    failures = {line["condition"]: line["failure"] for line in lines if "failure" in line}
    cells = [
        {
            "row": row,
            "column": column,
            "values": values[row, column],
            "estimate": _estimate(values[row, column].values()),
            "failure": failures.get(condition),
        }
        for (row, column), (condition, _) in claim.cells.items()
    ]
    return {field: getattr(claim, field) for field in STATED} | {
        "seeds": claim.seeds,
        "runs": len(lines),
        "expected_runs": claim.seeds * len(claim.conditions),
        "seconds": round(sum(line["seconds"] for line in lines)),
        "cells": cells,
        "comparisons": [_compared(comparison, values) for comparison in claim.comparisons],
    }


def summary(lines):
    """All that the page says, from the lines of runs, as JSON can hold it."""
    by_claim = {name: [line for line in lines if line["claim"] == name] for name in CLAIMS}
    return {
        "torch": sorted({line["torch"] for line in lines}),
        "commit": sorted({line["commit"] for line in lines}),
        "claims": {name: _summary(CLAIMS[name], some) for name, some in by_claim.items() if some},
        "not_run": [CLAIMS[name].title for name, some in by_claim.items() if not some],
        "lines": lines,
    }


def _table(head, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _cell(cell):
    if not cell["values"]:
        return "fails" if cell["failure"] else ""
    error = cell["estimate"]["error"]
    return f"{cell['estimate']['mean']:.3f}" + (f" ± {error:.3f}" if error else "")


def _mean(estimate):
    return f"{estimate['mean']:+.3f}" if estimate else ""


def _interval(estimate):
    if estimate is None or estimate["error"] is None:
        return "none"
    return f"{estimate['low']:+.3f} to {estimate['high']:+.3f}"


MEANING = {
    statistics.SEEN: ("a gain of interest", "no loss of interest"),
    statistics.NOT_SEEN: ("the interval excludes a gain of interest", ""),
    statistics.OPPOSITE: ("a loss of interest", "a loss of interest"),
    statistics.UNCERTAIN: (
        "the interval holds both a gain of interest and too little",
        "the interval holds both a loss of interest and none",
    ),
}


def _sentence(comparison):
    """The verdict in words, from the numbers alone."""
    estimate = comparison["estimate"]
    if estimate is None or estimate["error"] is None:
        return f"Too uncertain to say: fewer than two seeds have {comparison['what']}."
    meaning = MEANING[comparison["verdict"]][comparison["no_loss"]]
    return (
        f"{comparison['verdict'].capitalize()}: {comparison['what']} is {estimate['mean']:+.3f} "
        f"({_interval(estimate)}, {estimate['seeds']} seeds): {meaning}."
    )


def _could(comparison):
    """Return whether the interval is narrow enough for the smallest effect of interest."""
    estimate = comparison["estimate"]
    if estimate is None or estimate["error"] is None:
        return ""
    could = "yes" if estimate["least"] <= comparison["smallest"] else "no"
    return f"{could}, ±{estimate['least']:.3f}"


def _section(name, claim):
    columns = list(dict.fromkeys(cell["column"] for cell in claim["cells"]))
    rows = list(dict.fromkeys(cell["row"] for cell in claim["cells"]))
    cells = {(cell["row"], cell["column"]): _cell(cell) for cell in claim["cells"]}
    failures = dict.fromkeys(cell["failure"] for cell in claim["cells"] if cell["failure"])
    compared = [
        [
            comparison["what"],
            _mean(comparison["estimate"]),
            _interval(comparison["estimate"]),
            f"{'-' if comparison['no_loss'] else '+'}{comparison['smallest']:.2f}",
            _could(comparison),
            comparison["verdict"],
        ]
        for comparison in claim["comparisons"]
    ]
    head = ["difference", "mean", "95 % interval", "of interest", "narrow enough", "verdict"]
    runs = f"{claim['runs']} of {claim['expected_runs']} runs, {claim['seconds']} s in all."
    return [
        f"## {claim['title']}",
        f"**Hypothesis.** {claim['hypothesis']}",
        f"**Setting.** {claim['setting']} Seeds {FIRST_SEED} to "
        f"{FIRST_SEED + claim['seeds'] - 1}; {runs}",
        f"{claim['metric'][0].upper()}{claim['metric'][1:]}; columns: {claim['across']}; mean ± "
        "standard error:",
        _table(
            ["", *columns], [[row, *(cells.get((row, c), "") for c in columns)] for row in rows]
        ),
        *(f"Fails: `{failure}`" for failure in failures),
        f"![{claim['title']}]({PICTURES}/{name}.png)",
        "Paired by seed:",
        _table(head, compared),
        _sentence(claim["comparisons"][0]),
    ]


def page(summary):
    """The page, in Markdown."""
    claims = summary["claims"]
    rows = [
        [
            f"[{claim['title']}](#{claim['title'].lower().replace(' ', '-')})",
            claim["hypothesis"],
            _mean(claim["comparisons"][0]["estimate"]),
            _interval(claim["comparisons"][0]["estimate"]),
            claim["comparisons"][0]["verdict"],
        ]
        for claim in claims.values()
    ]
    unfinished = [
        f"{claim['title']} ({claim['runs']} of {claim['expected_runs']} runs)"
        for claim in claims.values()
        if claim["runs"] < claim["expected_runs"]
    ]
    return "\n\n".join(
        [
            "# The claims of BiT in miniature",
            INTRODUCTION.format(
                torch=", ".join(summary["torch"]), commit=", ".join(summary["commit"])
            ),
            _table(["claim", "hypothesis", "difference", "95 % interval", "verdict"], rows),
            *([f"Not finished: {', '.join(unfinished)}."] if unfinished else []),
            *([f"Not run: {', '.join(summary['not_run'])}."] if summary["not_run"] else []),
            *(part for name, claim in claims.items() for part in _section(name, claim)),
        ]
    )


def write(summary, folder):
    """Write claims.json, claims.md and the pictures into a folder."""
    with files.atomic_write(folder / RESULTS) as part:
        part.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_page(summary, folder)


def write_page(summary, folder):
    """Write claims.md and the pictures."""
    (folder / PICTURES).mkdir(exist_ok=True)
    for name, claim in summary["claims"].items():
        pictures.draw(folder / PICTURES / f"{name}.png", claim)
    with files.atomic_write(folder / PAGE) as part:
        part.write_text(page(summary) + "\n")


if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:])
    write_page(json.loads(source.read_text()), folder)
