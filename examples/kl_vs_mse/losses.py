"""The paper's losses, by kdfast and in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import kdfast

IMPLEMENTATIONS = ("kdfast", "eager")


@dataclass(frozen=True)
class Loss:
    """``alpha * tau**2 * KL(teacher || student) + (1 - alpha) * CE``, the cross-entropy alone, or the MSE of the logits alone."""

    kind: str  # "ce", "kl" or "mse"
    tau: float = 1.0
    alpha: float = 1.0

    def __str__(self) -> str:
        if self.kind != "kl":
            return self.kind
        return f"kl tau={self.tau:g}" + (f" alpha={self.alpha:g}" if self.alpha != 1 else "")

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor, implementation: str) -> Tensor:
        """The mean over all rows of (..., classes) logits."""
        if self.kind == "ce":
            return F.cross_entropy(student.flatten(0, -2), labels.flatten())
        assert teacher is not None
        if implementation == "eager":
            return self._eager(student, teacher, labels)
        if self.kind == "mse":
            return kdfast.logit_mse(student, teacher)
        if self.alpha == 1:
            return kdfast.kl_div_tau(student, teacher, self.tau, reduction="mean")
        return kdfast.kd_loss(student, teacher, labels, tau=self.tau, alpha=self.alpha)

    def _eager(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "mse":
            return F.mse_loss(student, teacher)
        soft = eager_kl(student, teacher, self.tau)
        if self.alpha == 1:
            return soft
        return self.alpha * soft + (1 - self.alpha) * F.cross_entropy(student.flatten(0, -2), labels.flatten())


def eager_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """The lines that kdfast replaces. At tau = inf they give NaN, so their limit stands in for them."""
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    if math.isinf(tau):
        difference = student - teacher
        centred = difference - difference.mean(-1, keepdim=True)
        return centred.square().sum(-1).mean() / (2 * student.size(-1))
    log_q, log_p = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * tau**2


CE = Loss("ce")
MSE = Loss("mse")


def kl(tau: float, alpha: float = 1.0) -> Loss:
    """The distillation loss at one temperature, mixed with the cross-entropy where alpha < 1."""
    return Loss("kl", tau, alpha)
