"""Cross-entropy with the target and a soft part in Triton: the operators kd_loss_* of csrc/ops.cpp.

The kernels are those of kl_div_tau.py and logit_mse.py, whose rows take the hard part of cross_entropy.py along.
"""

from typing import Any

from torch import Tensor

from kdfast.triton.kl_div_tau import KlDivTau
from kdfast.triton.launch import Call, HardPart, operators
from kdfast.triton.logit_mse import LogitMse


def kd_loss(student: Tensor, teacher: Tensor, *rest: Any) -> Call:
    *options, target, tau, alpha, soft, ignore_index, label_smoothing = rest
    hard = HardPart(target, alpha, ignore_index, label_smoothing)
    if soft == 0:
        return KlDivTau(student, teacher, *options, tau, tau, True, hard=hard)
    return LogitMse(student, teacher, *options, soft == 2, soft == 2, hard=hard)


OPERATORS = operators(kd_loss)
