"""Draws a run's CSV files, as PNG and SVG, and prints them as Markdown: ``python -m benchmarks.figures FOLDER [--markdown]``.

``speed.csv`` gives one figure a loss: time a pair of logits and GB/s over the number of classes, the copy as a dashed line.
``error.csv`` gives the error of kl_div_tau over the temperature. Backgrounds are transparent, colours and text of a
brightness that shows on white and on black.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, str]
INK = "#767c85"
STYLE = {
    "kdfast": ("#e0661c", "o"),
    "kdfast-triton": ("#d49a00", "s"),
    "eager": ("#3d8bd9", "v"),
    "compile": ("#2ea36b", "^"),
    "liger": ("#a970d9", "D"),
    "orda": ("#d4588f", "P"),
    "fla": ("#8c8f2b", "X"),
    "trl": ("#1f9fae", "<"),
    "torchdistill": ("#b0705a", ">"),
}
LABELS = {"kdfast": "kdfast C++", "eager": "eager PyTorch", "compile": "torch.compile", "kdfast-triton": "kdfast Triton"}
SETTINGS = {
    "figure.dpi": 150,
    "savefig.transparent": True,
    "font.size": 11,
    "svg.hashsalt": "kdfast",
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def read(path: Path) -> list[Row]:
    """The lines of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def line(axes: Axes, provider: str, points: Sequence[tuple[float, float]]) -> None:
    """A provider's curve, in its colour."""
    colour, marker = STYLE.get(provider, (INK, "."))
    if provider == "copy":
        axes.plot(*zip(*points, strict=True), color=INK, linestyle="--", label="copy")
    else:
        on_top = 3 if provider == "kdfast" else 2
        label = LABELS.get(provider, provider)
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label, zorder=on_top)


def save(figure: Figure, path: Path, about: str) -> list[Path]:
    """Legend and machine below; PNG and SVG."""
    axes = figure.axes
    entries = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(6, len(entries)))
    figure.supxlabel(about, fontsize=8, x=0.5)
    for a in axes:
        a.grid(True, which="major")
        a.minorticks_off()
    written = [path.with_suffix(end) for end in (".png", ".svg")]
    for target in written:
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    plt.close(figure)
    return written


def draw_speed(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A figure for each loss of logits: a row of axes for each dtype, time and GB/s, forward + backward."""
    written = []
    modes = {r["allocation"] for r in rows}
    mode = next(m for m in ("reused", "default", "fresh") if m in modes)
    for loss in dict.fromkeys(r["loss"] for r in rows):
        mine = [r for r in rows if (r["loss"], r["pass"], r["allocation"]) == (loss, "fwd+bwd", mode) and r["bytes"]]
        dtypes = list(dict.fromkeys(r["dtype"] for r in mine))
        shapes = sorted({tuple(map(int, r["shape"].split("x"))) for r in mine}, key=lambda shape: shape[1])
        if len({k for _, k in shapes}) < 2:
            continue
        figure, grid = plt.subplots(len(dtypes), 2, figsize=(10, 3.2 * len(dtypes) + 0.9), layout="constrained", squeeze=False)
        for (left, right), dtype in zip(grid, dtypes, strict=True):
            for provider in dict.fromkeys(r["provider"] for r in mine):
                of = sorted(
                    (
                        (int(r["shape"].split("x")[1]), math.prod(map(int, r["shape"].split("x"))), r)
                        for r in mine
                        if (r["dtype"], r["provider"]) == (dtype, provider)
                    ),
                    key=lambda x: x[0],
                )
                line(left, provider, [(k, 1e6 * float(r["median_ms"]) / pairs) for k, pairs, r in of])
                line(right, provider, [(k, float(r["gb_per_s"])) for k, _, r in of])
            left.set(title=f"{loss}, {dtype}: time", ylabel="ns a pair of logits", yscale="log")
            right.set(title=f"{loss}, {dtype}: bandwidth", ylabel="GB/s", yscale="log")
            for axes in (left, right):
                axes.set_xscale("log")
                axes.set_xticks([k for _, k in shapes], [str(k) for _, k in shapes], fontsize=8)
        for axes in grid[-1]:
            axes.set_xlabel(f"classes K (rows: {', '.join(str(rows) for rows, _ in shapes)})")
        for axes in grid.flat:
            axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        threads = f"{mine[0]['threads']} thread(s), " if mine[0]["threads"] else ""
        written += save(figure, folder / f"{loss}-speed", f"forward + backward, {threads}memory {mode}; {mine[0]['machine']}")
    return written


def draw_error(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A row of axes for each dtype: the loss's error and the gradient's, over the temperature; infinity at the right end."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    taus = sorted({float(r["tau"]) for r in rows})
    finite = [t for t in taus if not math.isinf(t)]
    if len(taus) < 2 or not finite:
        return []
    end = finite[-1] * 30
    places = {tau: end if math.isinf(tau) else tau for tau in taus}
    figure, grid = plt.subplots(len(dtypes), 2, figsize=(10, 3.2 * len(dtypes) + 0.9), layout="constrained", squeeze=False)
    for row, dtype in zip(grid, dtypes, strict=True):
        for axes, column, what in zip(row, ("loss_error", "gradient_error"), ("loss", "student's gradient"), strict=True):
            for provider in dict.fromkeys(r["provider"] for r in rows):
                points = [
                    (places[float(r["tau"])], max(float(r[column]), 1e-10))
                    for r in rows
                    if (r["dtype"], r["provider"]) == (dtype, provider) and math.isfinite(float(r[column]))
                ]
                if points:
                    line(axes, provider, sorted(points))
            axes.set(title=f"{dtype}: {what}", xscale="log", yscale="log", ylabel="relative error")
            axes.set_xticks(list(places.values()), [tick(tau) for tau in places], fontsize=9)
            axes.axhline(1, color=INK, linewidth=1, linestyle=":")
    for axes in grid[-1]:
        axes.set_xlabel("temperature tau")
    return save(figure, folder / "kl_div_tau-error", f"kl_div_tau {rows[0]['shape']}, against float64; {rows[0]['machine']}")


def tick(tau: float) -> str:
    """A temperature, short."""
    return "∞" if math.isinf(tau) else f"{tau:g}" if tau < 1e4 else f"$10^{{{math.log10(tau):.0f}}}$"


def draw(folder: Path) -> list[Path]:
    """The plots of a run's folder, written beside its CSV files."""
    written: list[Path] = []
    with plt.rc_context(SETTINGS):
        for name, plot in (("speed.csv", draw_speed), ("error.csv", draw_error)):
            if (folder / name).exists():
                written += plot(read(folder / name), folder)
    print(f"{len(written)} plots in {folder}")
    return written


def markdown(folder: Path) -> str:
    """The table of forward + backward times: a line for each loss, shape, dtype and way of allocation."""
    rows = [r for r in read(folder / "speed.csv") if r["pass"] == "fwd+bwd" and r["provider"] != "copy"]
    names = [n for n in dict.fromkeys(r["provider"] for r in rows) if n != "kdfast"]
    others = [n for n in names if n in ("eager", "compile")]
    lines = [f"{rows[0]['machine']}; {rows[0]['threads']} thread(s); milliseconds forward + backward, medians.", ""]
    headers = [
        "loss",
        "rows × K, dtype",
        "memory",
        *(LABELS.get(n, n) for n in names),
        "kdfast",
        *(f"{n} / kdfast" for n in others),
    ]
    headers += ["of copy", "kdfast's error"]
    lines += [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    for case in dict.fromkeys((r["loss"], r["shape"], r["dtype"], r["allocation"]) for r in rows):
        group = {r["provider"]: r for r in rows if (r["loss"], r["shape"], r["dtype"], r["allocation"]) == case}
        if "kdfast" not in group:
            continue
        base = group["kdfast"]
        loss, shape, dtype, mode = case
        cells = [f"`{loss}`", f"{shape.replace('x', ' × ')} {dtype}", mode]
        cells += [cell(group.get(n)) for n in (*names, "kdfast")]
        cells += [f"{float(group[n]['median_ms']) / float(base['median_ms']):.1f}" if n in group else "" for n in others]
        cells += [f"{float(base['percent_of_copy']):.0f}%" if base["percent_of_copy"] else ""]
        cells += [f"{float(base['loss_error']):.0e} / {float(base['gradient_error']):.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    """A time; with a remark where the answer is wrong."""
    if row is None:
        return ""
    value = float(row["median_ms"])
    text = f"{value:.3f}" if value < 1 else f"{value:.3g}"
    return f"{text} (wrong)" if row["wrong"] == "True" else text


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and print the table if it is wanted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where speed.csv and error.csv are")
    parser.add_argument("--markdown", action="store_true", help="print the table of times")
    options = parser.parse_args(argv)
    draw(options.folder)
    if options.markdown:
        print(markdown(options.folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
