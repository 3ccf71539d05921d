"""``python -m examples.kl_vs_mse``: the command line."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.kl_vs_mse import report
from examples.kl_vs_mse.losses import IMPLEMENTATIONS
from examples.kl_vs_mse.studies import STUDIES, Plan
from examples.kl_vs_mse.tasks import TASKS
from examples.kl_vs_mse.training import Laboratory

TAUS = [1.0, 3.0, 5.0, 20.0, math.inf]


def at_least_one(text: str) -> int:
    """A count."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def temperature(text: str) -> float:
    """A number above 0, or inf."""
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {number}")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {number}")
    return number


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.kl_vs_mse",
        description="When KL and when MSE: the study of Kim et al. (IJCAI 2021) on your data.",
    )
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"], metavar="STUDY", help=f"{', '.join(STUDIES)} or all")
    parser.add_argument("--data", choices=list(TASKS), default="digits", help="(default %(default)s)")
    parser.add_argument("--data-folder", type=Path, default=Path("data"), help="holds cifar-100-python (default %(default)s)")
    parser.add_argument("--seeds", type=at_least_one, help="repetitions (default: 5 of digits, 3 of text and cifar100)")
    parser.add_argument("--epochs", type=at_least_one, help="passes over the training data (default: the data's own)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=at_least_one, default=1, help="of torch on the CPU (default 1: small networks)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/kl_vs_mse"), help="results, one folder a data set (default %(default)s)"
    )
    parser.add_argument(
        "--loss-impl", choices=IMPLEMENTATIONS, default="kdfast", help="who computes the losses (default %(default)s)"
    )
    parser.add_argument("--taus", type=temperature, nargs="+", help="of sweep and features (default 1 3 5 20 inf)")
    parser.add_argument("--alphas", type=share, nargs="+", help="of sweep (default 0.1 0.2 ... 1, of text 0.1 0.5 1)")
    parser.add_argument("--label-noise", type=share, nargs="+", help="of noise (default 0.2 0.4 0.6, of text 0.3 0.6)")
    parser.add_argument("--sequential-tau", type=temperature, default=3.0, help="of sequential's KL (default 3)")
    parser.add_argument("--quick", action="store_true", help="5 seeds, tau 1 4 20 inf, alpha 0.5 1: a look in a minute or two")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the studies; the report's path."""
    parser, options = parse(argv)
    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    names = list(STUDIES) if "all" in options.studies else list(dict.fromkeys(options.studies))
    try:
        task = TASKS[options.data](options.data_folder)
        epochs = options.epochs or task.epochs
        laboratory = Laboratory(task, epochs, options.device, options.loss_impl, options.out / task.name)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    plan = Plan(
        laboratory=laboratory,
        seeds=range(options.seeds or (5 if options.quick else task.seeds)),
        taus=sorted(set(options.taus or ([1.0, 4.0, 20.0, math.inf] if options.quick else TAUS))),
        alphas=sorted(set(options.alphas or ([0.5, 1.0] if options.quick else task.alphas))),
        label_noise=sorted(set(options.label_noise or task.label_noise)),
        sequential_tau=options.sequential_tau,
        repeats=20 if options.quick else 100,
    )
    for name in names:
        STUDIES[name](plan)
    sizes = [f"- {role}: {network}" for role, network in task.networks.items()]
    introduction = [
        "\n".join(sizes),
        f"{epochs} epochs of batches of {task.batch}, {task.optimizer} at {task.rate:g}, divided by 10 at half and three quarters. "
        f"All students of a seed share the teacher, their first weights and their batches. {report.machine(options.device)}.",
    ]
    path = report.assemble(laboratory.folder, f"KL or MSE: {task.name}", introduction)
    print(f"{report.machine(options.device)}\n{time.perf_counter() - start:.0f} s in all; report: {path}")
    return path


if __name__ == "__main__":
    main()
