"""Distil a digit classifier: one teacher, a tiny student, and every loss of kdfast side by side.

The data are scikit-learn's bundled handwritten digits (1797 images of 8x8 pixels, nothing is downloaded). For each seed
a wide teacher learns from 1000 images. Students of 16 hidden units then see only 100 of them, under pixel noise, and
learn from the labels alone (cross-entropy) or from the teacher's logits alone: ``kdfast.kl_div_tau`` at several
temperatures, its limit at infinity, and ``kdfast.logit_mse``. All students of a seed start from the same weights and
see the same noise, so a difference between two rows of the table comes from the loss.

Run ``python -m examples.digits`` (about a minute on two cores) or ``python -m examples.digits --quick`` (seconds).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kdfast
from benchmarks import machine, print_table

TEACHER_IMAGES, STUDENT_IMAGES, BATCH = 1000, 100, 100
TEACHER_NOISE, STUDENT_NOISE = 0.4, 0.8  # standard deviation of the noise on pixels in [-1, 1]
TEACHER_EPOCHS = 40
CROSS_ENTROPY = "cross-entropy"

Extended = npt.NDArray[np.longdouble]
Loss = Callable[[Tensor, Tensor], Tensor]  # (student logits, teacher logits) -> scalar
Lesson = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student logits, noisy images, their indices) -> scalar


@dataclass(frozen=True)
class Method:
    """A way to learn from the teacher, by kdfast and in plain PyTorch."""

    name: str
    fused: Loss
    eager: Loss


def eager_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """The five lines that kdfast replaces. At tau = inf they give NaN, so their limit stands in for them."""
    if math.isinf(tau):
        difference = student - teacher
        centred = difference - difference.mean(-1, keepdim=True)
        return centred.square().sum(-1).mean() / (2 * student.size(-1))
    log_q, log_p = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * tau**2


def kl_method(tau: float) -> Method:
    """``kdfast.kl_div_tau`` at one temperature, beside its eager counterpart."""
    name = f"kl_div_tau, tau={tau:g}"
    return Method(name, lambda s, t: kdfast.kl_div_tau(s, t, tau), lambda s, t: eager_kl(s, t, tau))


METHODS = [
    *(kl_method(tau) for tau in (1.0, 4.0, 20.0, math.inf)),
    Method("logit_mse", lambda s, t: kdfast.logit_mse(s, t), lambda s, t: F.mse_loss(s, t)),
]


# ---------------------------------------------------------------------------------------------------- training


def mlp(hidden: int, layers: int, dropout: float = 0.0) -> nn.Sequential:
    """A plain perceptron from 64 pixels to 10 logits."""
    blocks: list[nn.Module] = []
    width = 64
    for _ in range(layers):
        blocks += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        width = hidden
    return nn.Sequential(*blocks, nn.Linear(width, 10))


def from_labels(labels: Tensor) -> Lesson:
    """Learn the labels."""
    return lambda logits, _, index: F.cross_entropy(logits, labels[index])


def from_teacher(teacher: nn.Module, loss: Loss) -> Lesson:
    """Learn what the teacher says of the same noisy images."""

    def lesson(logits: Tensor, images: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(images)
        return loss(logits, teacher_logits)

    return lesson


def train(net: nn.Module, images: Tensor, lesson: Lesson, epochs: int, noise: float, seed: int) -> None:
    """Adam on noisy copies of the images."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    batches = max(1, len(images) // BATCH)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=epochs * batches)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order[: batches * BATCH].chunk(batches):
            noisy = images[index] + noise * torch.randn(len(index), 64, generator=generator).to(images.device)
            loss = lesson(net(noisy), noisy, index)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of images whose largest logit is the label's."""
    return 100 * float((net(images).argmax(-1) == labels).double().mean())


@dataclass
class Results:
    """Accuracies by method (one for each seed), and the first seed's logits on the test images."""

    accuracies: dict[str, list[float]]
    student_logits: Tensor
    teacher_logits: Tensor


def run(seeds: int, epochs: int, device: torch.device) -> Results:
    """Train a teacher and all students for every seed."""
    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target, device=device)
    accuracies: dict[str, list[float]] = {name: [] for name in ("teacher", CROSS_ENTROPY, *(m.name for m in METHODS))}
    kept: tuple[Tensor, Tensor] | None = None

    latest = TextColumn("{task.fields[latest]}")
    with Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), latest) as progress:
        task = progress.add_task("training", total=seeds * len(accuracies), latest="")

        def record(name: str, net: nn.Module, test: Tensor) -> None:
            accuracies[name].append(accuracy(net, images[test], labels[test]))
            progress.update(task, advance=1, latest=f"{name}: {accuracies[name][-1]:.1f}%")

        for seed in range(seeds):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            learn, scarce, test = order[:TEACHER_IMAGES], order[:STUDENT_IMAGES], order[TEACHER_IMAGES:]

            torch.manual_seed(seed)
            teacher = mlp(256, layers=2, dropout=0.2).to(device)
            train(teacher, images[learn], from_labels(labels[learn]), TEACHER_EPOCHS, TEACHER_NOISE, seed)
            record("teacher", teacher, test)

            lessons = {
                CROSS_ENTROPY: from_labels(labels[scarce]),
                **{m.name: from_teacher(teacher, m.fused) for m in METHODS},
            }
            for name, lesson in lessons.items():
                torch.manual_seed(seed)
                student = mlp(16, layers=1).to(device)
                train(student, images[scarce], lesson, epochs, STUDENT_NOISE, seed)
                record(name, student, test)
            if kept is None:
                with torch.no_grad():
                    kept = student(images[test]), teacher(images[test])
    assert kept is not None
    return Results(accuracies, *kept)


# -------------------------------------------------------------------------------------------- time and accuracy


def time_step(losses: Sequence[Loss], student: Tensor, teacher: Tensor, repeats: int) -> list[float]:
    """Median milliseconds of each loss, forward and backward, the runs taking turns."""
    student = student.detach().requires_grad_()
    times: list[list[float]] = [[] for _ in losses]
    for repeat in range(repeats + 10):  # the first ten warm up
        for loss, log in zip(losses, times, strict=True):
            if student.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(loss(student, teacher), student)
            if student.is_cuda:
                torch.cuda.synchronize()
            if repeat >= 10:
                log.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(log) for log in times]


def exact_kl(student: Tensor, teacher: Tensor, tau: float) -> tuple[float, Extended]:
    """The textbook loss and its gradient in extended precision (float64 where the platform has no better)."""

    def log_softmax(logits: Tensor) -> Extended:
        z = logits.double().cpu().numpy().astype(np.longdouble) / tau
        z -= z.max(-1, keepdims=True)
        z -= np.log(np.exp(z).sum(-1, keepdims=True))
        return z

    log_q, log_p = log_softmax(student), log_softmax(teacher)
    q, p = np.exp(log_q), np.exp(log_p)
    loss = tau**2 * (p * (log_p - log_q)).sum() / len(student)
    gradient: Extended = (q - p) * np.longdouble(tau / len(student))
    return float(loss), gradient


def errors(loss: Callable[[Tensor, Tensor, float], Tensor], s: Tensor, t: Tensor, tau: float) -> tuple[float, float]:
    """Relative error of the loss, and of its gradient in the L2 norm."""
    true_loss, true_gradient = exact_kl(s, t, tau)
    s = s.detach().requires_grad_()
    value = loss(s, t, tau)
    (gradient,) = torch.autograd.grad(value, s)
    difference = gradient.double().cpu().numpy() - true_gradient
    gradient_error = float(np.linalg.norm(difference)) / float(np.linalg.norm(true_gradient))
    return abs(value.item() - true_loss) / true_loss, gradient_error


# ------------------------------------------------------------------------------------------------------ output


def show(results: Results, repeats: int) -> None:
    """Print the accuracy over the seeds and the time of a step's loss, one row for each method."""
    student, teacher = results.student_logits[:BATCH], results.teacher_logits[:BATCH]
    timed = {m.name: time_step([m.fused, m.eager], student, teacher, repeats) for m in METHODS}
    rows = []
    for name, values in results.accuracies.items():
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        row = [name, f"{statistics.mean(values):.2f}", spread, f"{min(values):.1f} .. {max(values):.1f}"]
        if name in timed:
            fused, eager = timed[name]
            row += [f"{fused:.3f}", f"{eager:.3f}", f"{eager / fused:.1f}x"]
        rows.append(row)
    seeds = len(results.accuracies[CROSS_ENTROPY])
    print_table(
        f"Accuracy on {len(results.student_logits)} test images over {seeds} seeds. Time of one step's loss: "
        f"{BATCH} x 10 logits, forward and backward, median",
        ["learns by", "accuracy %", "std", "min .. max", "kdfast ms", "eager ms", "eager / kdfast"],
        rows,
    )


def plot(results: Results, path: Path) -> None:
    """Accuracy of every method, and the numerical error of eager and of kdfast over the temperature."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), width_ratios=(1.15, 1, 1), layout="constrained")

    names = list(results.accuracies)
    for y, name in enumerate(names):
        values = results.accuracies[name]
        colour = {"teacher": "0.45", CROSS_ENTROPY: "C1"}.get(name, "C0")
        left.scatter(values, [y + 0.16] * len(values), color=colour, s=18, alpha=0.45, linewidths=0)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        left.errorbar(statistics.mean(values), y - 0.1, xerr=spread, fmt="D", color=colour, capsize=4, markersize=6)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.6)
    left.set_xlabel("test accuracy, %")
    left.set_title(f"Students of 16 hidden units, {STUDENT_IMAGES} images\n(dots: seeds; diamonds: mean and std)")
    left.grid(axis="x", alpha=0.3)

    temperatures = np.geomspace(0.05, 1e4, 28)
    for axes, dtype, bits in ((middle, torch.float32, "float32"), (right, torch.bfloat16, "bfloat16")):
        student, teacher = results.student_logits.to(dtype), results.teacher_logits.to(dtype)
        for label, colour, loss in (("eager PyTorch", "C3", eager_kl), ("kdfast", "C0", kdfast.kl_div_tau)):
            both = np.array([errors(loss, student, teacher, float(tau)) for tau in temperatures])
            both = np.maximum(both, 1e-9)  # an error of exactly 0 stays on the logarithmic axis
            axes.loglog(temperatures, both[:, 0], color=colour, label=f"{label}: loss")
            axes.loglog(temperatures, both[:, 1], color=colour, linestyle="--", label=f"{label}: gradient")
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.set_ylim(1e-9, 1e5)
        axes.set_xlabel("temperature tau")
        axes.set_title(f"Error of the KL loss on these logits, {bits}")
        axes.grid(alpha=0.3)
    middle.set_ylabel("relative error (1 = no correct digit)")
    middle.legend(loc="upper left", framealpha=0.9)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> Results:
    """Parse the options, train, print the table, save the picture."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, help="number of repetitions (default 10; 2 with --quick)")
    parser.add_argument("--epochs", type=int, help="passes over a student's images (default 300; 150 with --quick)")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the picture (default %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, to see that everything works")
    options = parser.parse_args(argv)
    seeds = options.seeds if options.seeds is not None else 2 if options.quick else 10
    epochs = options.epochs if options.epochs is not None else 150 if options.quick else 300
    if seeds < 1 or epochs < 1:
        parser.error(f"--seeds and --epochs must be at least 1, got {seeds} and {epochs}")

    start = time.perf_counter()
    torch.set_num_threads(1)  # the nets are too small to share out
    results = run(seeds, epochs, options.device)
    show(results, repeats=50 if options.quick else 500)
    plot(results, options.out)
    print(f"{machine(options.device)}\n{time.perf_counter() - start:.0f} s in all; picture: {options.out}")
    return results


if __name__ == "__main__":
    main()
