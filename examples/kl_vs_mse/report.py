"""Tables, CSV files, plots and the Markdown report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks import machine, print_table, write_csv

__all__ = ["COLOURS", "Section", "assemble", "machine", "mean_and_error", "standard_error", "write_csv"]

COLOURS = {
    "float64": "black", "kdfast float32": "C0", "kdfast bfloat16": "C2", "eager float32": "C3", "eager bfloat16": "C1",
}  # fmt: skip
ORDER = ("sweep", "limits", "features", "sequential", "noise")


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def mean_and_error(values: Sequence[float], digits: int = 2) -> str:
    """``75.31 ± 0.24``: mean and standard error."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {standard_error(values):.{digits}f}"


class Section:
    """What one study found: printed as it is added, and kept for the report."""

    def __init__(self, name: str, heading: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.parts = [f"## {heading}"]

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(text)

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, on the screen and in the report."""
        print_table(title, headers, rows)
        lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
        cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
        self.parts += [f"{title}:", "\n".join("| " + " | ".join(line) + " |" for line in cells)]

    def records(self, records: Sequence[Mapping[str, object]], device: Any) -> None:
        """The figures behind the tables, as CSV."""
        write_csv(self.folder / f"{self.name}.csv", records, device)

    def plot(self, figure: Figure, name: str, caption: str) -> None:
        """A picture, on a background of its own."""
        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=110, facecolor="white")
        plt.close(figure)
        print(f"picture: {path}")
        self.parts.append(f"![{caption}]({path.name})")

    def save(self) -> None:
        """Keep the section for the report."""
        (self.folder / f"{self.name}.md").write_text("\n\n".join(self.parts) + "\n")


def assemble(folder: Path, title: str, introduction: Sequence[str]) -> Path:
    """The report: the sections of all studies that were run into this folder."""
    sections = [path.read_text() for name in ORDER if (path := folder / f"{name}.md").exists()]
    path = folder / "report.md"
    path.write_text("\n\n".join([f"# {title}", *introduction, *(section.rstrip() for section in sections)]) + "\n")
    return path


# --------------------------------------------------------------------------------------------------------- figures


def heat_map(
    taus: Sequence[float], alphas: Sequence[float], means: np.ndarray, errors: np.ndarray, title: str, label: str
) -> Figure:
    """Means over the grid (taus x alphas), written into their cells."""
    figure, axes = plt.subplots(figsize=(max(6.0, 2.2 + 0.95 * len(alphas)), 1.8 + 0.62 * len(taus)), layout="constrained")
    image = axes.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for y in range(len(taus)):
        for x in range(len(alphas)):
            spread = "" if np.isnan(errors[y, x]) else f"\n±{errors[y, x]:.2f}"
            colour = "white" if means[y, x] < middle else "black"
            axes.text(x, y, f"{means[y, x]:.2f}{spread}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    axes.set_yticks(range(len(taus)), ["∞" if t == float("inf") else f"{t:g}" for t in taus])
    axes.set_xlabel("alpha (share of the KL; the rest is cross-entropy)")
    axes.set_ylabel("tau")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def limit_curves(taus: Sequence[float], curves: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> Figure:
    """form -> quantity -> values over tau, a panel for each quantity."""
    figure, panels = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    names = {
        "mse_cosine": "cosine with the MSE gradient (centred)",
        "label_cosine": "cosine with label matching",
        "error": "relative error of the gradient (L2)",
        "mse_ratio": "norm / norm of the MSE gradient (centred)",
        "label_ratio": "norm / tau / norm of label matching",
    }
    styles = {"float64": "-", "kdfast float32": "--", "kdfast bfloat16": ":", "eager float32": "-", "eager bfloat16": "-"}
    *plots, key = panels.flat
    for axes, (quantity, name) in zip(plots, names.items(), strict=True):
        for form, values in curves.items():
            if quantity == "error" and form == "float64":
                continue
            width = {"float64": 5.0, "kdfast float32": 2.4, "kdfast bfloat16": 2.4}.get(form, 1.6)
            axes.plot(
                taus, values[quantity], styles[form], color=COLOURS[form], linewidth=width, label=form,
                alpha=0.3 if form == "float64" else 1.0, zorder=3 if form.startswith("kdfast") else 2,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("temperature tau")
        if quantity.endswith("cosine"):
            axes.axhline(1, color="0.6", linewidth=0.8)
            axes.set_ylim(min(-0.05, *curves["float64"][quantity]), 1.05)
        else:
            axes.set_yscale("log")
            axes.axhline(1, color="0.6", linewidth=0.8)
        if quantity.endswith("ratio"):
            truth = np.asarray(curves["float64"][quantity])
            axes.set_ylim(truth.min() / 5, max(truth.max(), 1) * 5)
        axes.set_title(name, fontsize=11)
        axes.grid(alpha=0.3)
    key.axis("off")
    key.legend(*plots[0].get_legend_handles_labels(), loc="center", fontsize=12, handlelength=4)
    figure.suptitle(title)
    return figure


def histograms(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], title: str) -> Figure:
    """Of |s - t| and of the pairwise distances in the penultimate layer."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colours = {label: f"C{position}" for position, label in enumerate(left)}
    for axes, values, name in (
        (panels[0], left, "|s - t|, a test row"),
        (panels[1], right, "penultimate layer: distance of two test rows"),
    ):
        top = max(np.quantile(v, 0.99) for v in values.values())
        for label, v in values.items():
            teacher = label == "teacher"
            axes.hist(
                v, bins=60, range=(0, float(top)), density=True, histtype="step", linewidth=2.6 if teacher else 1.7,
                color="black" if teacher else colours[label], label=label,
            )  # fmt: skip
        axes.set_xlabel(name)
        axes.set_ylabel("density")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.suptitle(title)
    return figure


def lines(x: Sequence[str], curves: Mapping[str, Sequence[Sequence[float]]], xlabel: str, ylabel: str, title: str) -> Figure:
    """label -> the seeds' values at each x: mean and standard error."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for label, values in curves.items():
        axes.errorbar(
            x, [statistics.mean(v) for v in values], [standard_error(v) for v in values], marker="o", capsize=3, label=label
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    return figure
