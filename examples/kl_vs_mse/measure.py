"""What is measured on trained networks: gradients against their limits, features, and the time of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from examples.kl_vs_mse.losses import IMPLEMENTATIONS, Loss, eager_kl
from examples.kl_vs_mse.networks import Network
from examples.kl_vs_mse.training import Batch

# ------------------------------------------------------------------------------------------------------- gradients

#: name -> (the KL loss at tau, the type of the logits). The first is the truth, the definition in float64.
FORMS: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], torch.dtype]] = {
    "float64": (eager_kl, torch.float64),
    "kdfast float32": (kdfast.kl_div_tau, torch.float32),
    "kdfast bfloat16": (kdfast.kl_div_tau, torch.bfloat16),
    "eager float32": (eager_kl, torch.float32),
    "eager bfloat16": (eager_kl, torch.bfloat16),
}


@dataclass(frozen=True)
class Directions:
    """The student's gradient of the KL loss beside those of its two limits."""

    mse_cosine: float  # with (s - t - mean) / K, the limit at infinity
    mse_ratio: float  # of the norms
    plain_mse_cosine: float  # with (s - t) / K
    label_cosine: float  # with 1[argmax s] - 1[argmax t], the limit of gradient / tau at 0
    label_ratio: float  # of the norms, the gradient's divided by tau
    error: float  # relative, in L2, against the definition in float64


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between all of a and all of b."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def directions(student: Tensor, teacher: Tensor, tau: float, form: str) -> Directions:
    """For (rows, classes) logits, rounded to the form's type, which is also what the limits are computed from."""
    loss, dtype = FORMS[form]
    student, teacher = student.detach().to(dtype), teacher.detach().to(dtype)

    def gradient_of(loss: Callable[[Tensor, Tensor, float], Tensor], s: Tensor, t: Tensor) -> Tensor:
        leaf = s.clone().requires_grad_()
        return len(s) * torch.autograd.grad(loss(leaf, t, tau), leaf)[0].double()

    s, t = student.double(), teacher.double()
    gradient, truth = gradient_of(loss, student, teacher), gradient_of(eager_kl, s, t)
    plain = (s - t) / s.size(-1)
    centred = plain - plain.mean(-1, keepdim=True)
    label = (F.one_hot(s.argmax(-1), s.size(-1)) - F.one_hot(t.argmax(-1), s.size(-1))).double()
    return Directions(
        cosine(gradient, centred),
        float(gradient.norm() / centred.norm()),
        cosine(gradient, plain),
        cosine(gradient, label),
        float(gradient.norm() / tau / label.norm()),
        float((gradient - truth).norm() / truth.norm()),
    )


# -------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Features:
    """How a student's logits and penultimate layer compare with the teacher's, row by row."""

    logit_distance: Tensor  # |s - t|
    centred_distance: Tensor  # the same without the row's mean difference, which no softmax sees
    norm: Tensor  # of the penultimate layer
    pairwise: Tensor  # distances between the penultimate layers of two rows
    correlation: float  # of the pairwise distances with the teacher's


@torch.no_grad()
def features(student: Network, teacher: Network, inputs: Tensor, rows: int = 500) -> Features:
    """On the first rows of the inputs."""

    def outputs(network: Network) -> tuple[Tensor, Tensor]:
        penultimate = network.features(inputs).flatten(0, -2)[:rows].double()
        logits = network.head(penultimate.float()).double()
        return logits, penultimate

    (s, r), (t, r_teacher) = outputs(student), outputs(teacher)
    difference = s - t
    distances, teacher_distances = torch.pdist(r), torch.pdist(r_teacher)
    return Features(
        difference.norm(dim=-1),
        (difference - difference.mean(-1, keepdim=True)).norm(dim=-1),
        r.norm(dim=-1),
        distances,
        float(torch.corrcoef(torch.stack((distances, teacher_distances)))[0, 1]),
    )


# ------------------------------------------------------------------------------------------------------------ time


def fastest(calls: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each call, the calls taking turns: the minimum, which other processes disturb least."""
    best = [math.inf] * len(calls)
    for _ in range(repeats):
        for position, call in enumerate(calls):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[position] = min(best[position], 1e3 * (time.perf_counter() - start))
    return best


def time_loss(loss: Loss, student: Network, batch: Batch, repeats: int) -> list[float]:
    """Of each implementation: the loss alone, forward and backward to the logits; then the student's whole step without the
    optimizer."""
    inputs, labels, teacher_logits = batch
    logits = student(inputs).detach().requires_grad_()

    def alone(implementation: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits, teacher_logits, labels, implementation), logits)

    def whole(implementation: str) -> Callable[[], object]:
        weights = tuple(student.parameters())
        return lambda: torch.autograd.grad(loss(student(inputs), teacher_logits, labels, implementation), weights)

    return fastest([f(i) for f in (alone, whole) for i in IMPLEMENTATIONS], repeats, inputs.device)
