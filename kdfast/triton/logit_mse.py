"""Squared difference of the logits in Triton: the operators logit_mse_* of csrc/ops.cpp.

Without `center` a row needs nothing of itself: loss and gradient come from one read at any number of classes. With it, a row of up to a
few thousand classes lies in one program's registers, and a longer one goes through block by block, its gradient in a second pass.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kdfast.triton.kl_math import number
from kdfast.triton.launch import (
    Call,
    Divisor,
    grad_scale,
    gradient_args,
    load_tile,
    one_number,
    operators,
    store_gradient,
    store_loss,
    weight_of,
)

STATS = 3  # MseStat of csrc/kl_math.h: offset (0 here), mean, 1 / classes counted; with `center` only


@triton.jit
def _differences(s, t):
    """d, 0 for a class at -inf on both sides, which does not count; and whether it does."""
    counts = (s != -float("inf")) | (t != -float("inf"))
    return tl.where(counts, s - t, 0.0), counts


@triton.jit
def _mean_and_squares(d, counts, F: tl.constexpr):
    """(classes counted, mean difference, sum of the squares around it) of a tile's rows."""
    n = tl.sum(counts.to(F), 1)
    some = tl.where(n > 0.0, n, 1.0)
    mean = tl.sum(d, 1) / some
    # A class at -inf on one side alone: the loss is +inf, around any finite mean.
    mean = tl.where(tl.sum(tl.abs(d), 1) == float("inf"), 0.0, mean)
    left = tl.where(counts, d - mean[:, None], 0.0)
    shift = tl.sum(left, 1) / some
    shift = tl.where(tl.abs(shift) == float("inf"), 0.0, shift)
    return n, mean + shift, tl.sum(left * left, 1) - n * shift * shift


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    student, student_layout, teacher, teacher_layout, weight, weight_stride, rows, classes,
    scale: "fp64", divisor: "fp64", divisor_tensor, loss, grad_student, grad_layout, width,
    F: tl.constexpr, PER_ROW: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R rows without `center`: their loss and, where wanted, the student's gradient."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_weight = weight_of(weight, weight_stride, row, rows, F)
    used, there = (row_weight != 0.0)[:, None], (row < rows)[:, None]
    factor = number(scale, F) * row_weight
    total = tl.zeros([R, C], F)
    for start in range(0, tl.maximum(classes, width), C):
        k = start + tl.arange(0, C)
        mask = used & (k < classes)[None, :]
        s = load_tile(student, student_layout, row, k, mask, F)
        t = load_tile(teacher, teacher_layout, row, k, mask, F)
        d, _counts = _differences(s, t)
        total += d * d
        if grad_student is not None:
            g = d * (2.0 * factor * grad_scale(divisor, divisor_tensor, F))[:, None]
            store_gradient(grad_student, grad_layout, width, row, k, there, mask, g)
    store_loss(loss, row, rows, tl.where(row_weight != 0.0, tl.sum(total, 1) * factor, 0.0), PER_ROW)


@triton.jit(do_not_specialize=["rows"])
def centred_kernel(
    student, student_layout, teacher, teacher_layout, weight, weight_stride, rows, classes,
    scale: "fp64", divisor: "fp64", divisor_tensor, loss, row_stats, grad_student, grad_layout, width,
    F: tl.constexpr, PER_CLASS: tl.constexpr, PER_ROW: tl.constexpr, R: tl.constexpr, C: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """R rows with `center`: their loss and statistics and, where they are resident, the student's gradient where wanted."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_weight = weight_of(weight, weight_stride, row, rows, F)
    used, there = (row_weight != 0.0)[:, None], (row < rows)[:, None]
    k = tl.arange(0, C)
    mask = used & (k < classes)[None, :]
    if RESIDENT:
        s = load_tile(student, student_layout, row, k, mask, F)
        t = load_tile(teacher, teacher_layout, row, k, mask, F)
        d, counts = _differences(s, t)
        n, mean, squares = _mean_and_squares(d, counts, F)
    else:
        n, mean, squares = tl.zeros([R], F), tl.zeros([R], F), tl.zeros([R], F)
        for start in range(0, classes, C):
            mask = used & (start + k < classes)[None, :]
            s = load_tile(student, student_layout, row, start + k, mask, F)
            t = load_tile(teacher, teacher_layout, row, start + k, mask, F)
            d, counts = _differences(s, t)
            block_n, block_mean, block_squares = _mean_and_squares(d, counts, F)
            # Two parts of a row as one: all terms are positive.
            share = block_n / tl.maximum(n + block_n, 1.0)
            apart = tl.where(n > 0.0, block_mean - mean, 0.0)
            squares += block_squares + apart * apart * (n * share)
            mean = tl.where(n > 0.0, mean + apart * share, block_mean)
            n += block_n
    row_scale = number(scale, F)
    inv_n = 1.0 / n
    if PER_CLASS:
        row_scale = row_scale * inv_n
    store_loss(loss, row, rows, tl.where(row_weight != 0.0, squares * row_scale * row_weight, 0.0), PER_ROW)
    if row_stats is not None:
        tl.store(row_stats + row * 3, tl.zeros_like(mean), mask=row < rows)
        tl.store(row_stats + row * 3 + 1, mean, mask=row < rows)
        tl.store(row_stats + row * 3 + 2, inv_n, mask=row < rows)
    if RESIDENT and grad_student is not None:
        factor = 2.0 * grad_scale(divisor, divisor_tensor, F) * row_weight * row_scale
        for start in range(0, width, C):
            g = tl.where(counts, (d - mean[:, None]) * factor[:, None], 0.0)
            store_gradient(grad_student, grad_layout, width, row, start + k, there, mask & (start == 0), g)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    student, student_layout, teacher, teacher_layout, weight, weight_stride, rows, classes,
    scale: "fp64", divisor: "fp64", divisor_tensor, row_stats, grad_loss, grad_loss_stride,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, blocks,
    F: tl.constexpr, PER_CLASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of R rows and C classes of the gradients."""
    tile = tl.program_id(0).to(tl.int64)
    row = (tile // blocks) * R + tl.arange(0, R)
    k = (tile % blocks).to(tl.int32) * C + tl.arange(0, C)
    row_weight = weight_of(weight, weight_stride, row, rows, F)
    used, there = (row_weight != 0.0)[:, None], (row < rows)[:, None]
    mask = used & (k < classes)[None, :]
    s = load_tile(student, student_layout, row, k, mask, F)
    t = load_tile(teacher, teacher_layout, row, k, mask, F)
    d, counts = _differences(s, t)
    factor = 2.0 * grad_scale(divisor, divisor_tensor, F) * row_weight * number(scale, F)
    if grad_loss is not None:
        factor *= tl.load(grad_loss + row * grad_loss_stride, mask=row < rows, other=0.0).to(F)
    if row_stats is not None:
        d = tl.where(counts, d - tl.load(row_stats + row * 3 + 1, mask=row < rows, other=0.0)[:, None], 0.0)
        if PER_CLASS:
            factor *= tl.load(row_stats + row * 3 + 2, mask=row < rows, other=0.0)
    g = d * factor[:, None]
    if grad_student is not None:
        store_gradient(grad_student, student_grad_layout, student_width, row, k, there, mask, g)
    if grad_teacher is not None:
        store_gradient(grad_teacher, teacher_grad_layout, teacher_width, row, k, there, mask, -g)


# ---- on the host -----------------------------------------------------------------------------------------------------------------


class LogitMse(Call):
    def __init__(self, student: Tensor, teacher: Tensor, *rest: Any) -> None:
        *options, self.center, self.per_class = rest
        super().__init__(student, teacher, *options)
        self.stats = STATS if self.center else 0
        self.per_row = 1 if self.per_class else self.classes
        self.scale = 0.5 if self.per_class else 1.0

    def launch_forward(
        self, loss: Tensor | None, row_stats: Tensor | None, gradient: Tensor | None, divisor: Divisor
    ) -> Tensor:
        per_row = loss is not None
        r, c, warps, resident = forward_tile(self.classes, self.dtype.itemsize, self.center, gradient is not None)
        programs = triton.cdiv(self.rows, r)
        if loss is None:
            loss = self.empty((programs,))
        if not self.center:
            rows_kernel[(programs,)](
                *self.inputs,
                self.scale,
                *divisor,
                loss,
                *gradient_args(gradient),
                F=self.F,
                PER_ROW=per_row,
                R=r,
                C=c,
                num_warps=warps,
            )
            return loss
        if row_stats is None and not resident:
            row_stats = self.empty((self.rows, STATS))
        centred_kernel[(programs,)](
            *self.inputs, self.scale, *divisor, loss, row_stats, *gradient_args(gradient if resident else None),
            F=self.F, PER_CLASS=self.per_class, PER_ROW=per_row, R=r, C=c, RESIDENT=resident, num_warps=warps,
        )  # fmt: skip
        if gradient is not None and row_stats is not None:
            self.launch_gradients(row_stats, None, gradient, None, divisor)
        return loss

    def launch_gradients(
        self,
        row_stats: Tensor,
        grad_loss: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
        divisor: Divisor,
    ) -> None:
        width = max(g.shape[-1] for g in (grad_student, grad_teacher) if g is not None)
        c = min(1024, max(16, triton.next_power_of_2(width)))
        r = max(1, 1024 // c)
        blocks = triton.cdiv(width, c)
        gradient_kernel[(triton.cdiv(self.rows, r) * blocks,)](
            *self.inputs, self.scale, *divisor, row_stats if self.center else None,
            grad_loss, 0 if grad_loss is None or one_number(grad_loss) else 1,
            *gradient_args(grad_student), *gradient_args(grad_teacher), blocks,
            F=self.F, PER_CLASS=self.per_class, R=r, C=c, num_warps=2 if c <= 32 else 4,
        )  # fmt: skip


def forward_tile(classes: int, itemsize: int, center: bool, with_gradient: bool) -> tuple[int, int, int, bool]:
    """(rows a program, classes a tile, warps, whether a row lies in one tile)."""
    c = max(16, triton.next_power_of_2(classes))
    largest = 2048 if not center else 8192 if with_gradient else 4096
    resident = c <= largest // (itemsize // 4)
    if not resident:
        c = 2048 // (itemsize // 4)
    return max(1, 1024 // c), c, 1 if c == 1024 else 2 if c <= 32 else max(4, min(16, c // 512)), resident


OPERATORS = operators(LogitMse)
