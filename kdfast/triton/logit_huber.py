"""Robust difference of the logits in Triton: the operators logit_huber_* of csrc/ops.cpp, by the kernels of logit_mse.py."""

from typing import Any

from torch import Tensor

from kdfast.triton.launch import operators
from kdfast.triton.logit_mse import LogitDifference


class LogitHuber(LogitDifference):
    def __init__(self, student: Tensor, teacher: Tensor, *rest: Any) -> None:
        *options, delta, smooth_l1, center = rest
        kind, scale = ("smooth_l1", 1.0) if smooth_l1 else ("pseudo", delta)
        super().__init__(student, teacher, options, kind, center, False, scale, delta)


OPERATORS = operators(LogitHuber)
