"""softmax-KL at temperature tau in Triton: the operators kl_div_tau_* of csrc/ops.cpp. kl_math.py has the formulas.

A row of up to a few thousand classes lies in one program's registers, several rows in one where they are short: loss and gradient come
from one read. A longer row goes through block by block; its gradient is a second pass.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kdfast.triton.kl_math import (
    LOG2_E,
    difference,
    kl_of_part,
    merge,
    number,
    student_gradient,
    student_weight,
    sum_tile,
    teacher_weight,
)
from kdfast.triton.launch import (
    Call,
    Divisor,
    grad_scale,
    gradient_args,
    load_tile,
    one_number,
    operators,
    row_offsets,
    store_gradient,
    store_loss,
    weight_of,
)

STATS = 8  # KlStat of csrc/kernels.h: t_max, s_max, offset, centre, mean, kl, 1 / S0, 1 / Z


@triton.jit
def _temperatures(tau, teacher_tau, F: tl.constexpr):
    """tau / teacher_tau, tau, 1 / tau, log2(e) / tau, log2(e) / teacher_tau"""
    return (
        number(tau / teacher_tau, F),
        number(tau, F),
        number(1.0 / tau, F),
        number(LOG2_E / tau, F),
        number(LOG2_E / teacher_tau, F),
    )


@triton.jit
def _store_stats(row_stats, row, mask, part, kl):
    t_max, s_max, offset, centre, _rest, mean, s0, z, _excess, _lost = part
    at = row_stats + row * 8
    tl.store(at, t_max, mask=mask)
    tl.store(at + 1, s_max, mask=mask)
    tl.store(at + 2, offset, mask=mask)
    tl.store(at + 3, centre, mask=mask)
    tl.store(at + 4, mean, mask=mask)
    tl.store(at + 5, kl, mask=mask)
    tl.store(at + 6, 1.0 / s0, mask=mask)
    tl.store(at + 7, 1.0 / z, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    student, student_layout, teacher, teacher_layout, weight, weight_stride, rows, classes,
    tau: "fp64", teacher_tau: "fp64", scale: "fp64", divisor: "fp64", divisor_tensor,
    loss, row_stats, grad_student, grad_layout, width,
    F: tl.constexpr, EXACT: tl.constexpr, PER_ROW: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R whole rows: their loss, and either their statistics or the student's gradient."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    k = tl.arange(0, C)
    row_weight = weight_of(weight, weight_stride, row, rows, F)
    used = row_weight != 0.0
    mask = used[:, None] & (k < classes)[None, :]
    s = load_tile(student, student_layout, row, k, mask, F)
    t = load_tile(teacher, teacher_layout, row, k, mask, F)
    ratio, tau_f, inv_tau, student_log2, teacher_log2 = _temperatures(tau, teacher_tau, F)
    part, w, v, y = sum_tile(s, t, ratio, tau_f, inv_tau, student_log2, teacher_log2, EXACT, True)
    kl = kl_of_part(part, True)
    store_loss(loss, row, rows, tl.where(used, kl * number(scale, F) * row_weight, 0.0), PER_ROW)
    if row_stats is not None:
        _store_stats(row_stats, row, row < rows, part, kl)
    if grad_student is not None:
        t_max, s_max, offset, centre, rest, mean, s0, z, excess, lost = part
        factor = grad_scale(divisor, divisor_tensor, F) * row_weight * number(scale / tau, F)
        g = student_gradient(w, v, y - (mean + kl)[:, None], (factor / s0)[:, None], (factor / z)[:, None])
        at = grad_student + row_offsets(row, grad_layout)[:, None]
        there = (row < rows)[:, None]
        tl.store(at + k[None, :], tl.where(mask, g, 0.0).to(grad_student.dtype.element_ty), mask=there & (k < width)[None, :])
        for start in range(C, width, C):
            tl.store(
                at + (start + k)[None, :],
                tl.zeros([R, C], grad_student.dtype.element_ty),
                mask=there & (start + k < width)[None, :],
            )


@triton.jit(do_not_specialize=["rows"])
def online_kernel(
    student, student_layout, teacher, teacher_layout, weight, weight_stride, rows, classes,
    tau: "fp64", teacher_tau: "fp64", scale: "fp64",
    loss, row_stats,
    F: tl.constexpr, EXACT: tl.constexpr, PER_ROW: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One row, block by block: its loss and statistics."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row_weight = weight_of(weight, weight_stride, row, rows, F)
    used = row_weight != 0.0
    ratio, tau_f, inv_tau, student_log2, teacher_log2 = _temperatures(tau, teacher_tau, F)
    nothing = tl.zeros([1], F)
    part = (
        nothing - float("inf"),
        nothing - float("inf"),
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
    )
    for start in range(0, classes, C):
        k = start + tl.arange(0, C)
        mask = used[:, None] & (k < classes)[None, :]
        s = load_tile(student, student_layout, row, k, mask, F)
        t = load_tile(teacher, teacher_layout, row, k, mask, F)
        block, _w, _v, _y = sum_tile(s, t, ratio, tau_f, inv_tau, student_log2, teacher_log2, EXACT, False)
        part = merge(part, block, ratio, tau_f, inv_tau, student_log2, teacher_log2)
    kl = kl_of_part(part, False)
    store_loss(loss, row, rows, tl.where(used, kl * number(scale, F) * row_weight, 0.0), PER_ROW)
    if row_stats is not None:
        _store_stats(row_stats, row, row < rows, part, kl)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    student, student_layout, teacher, teacher_layout, weight, weight_stride, rows, classes,
    tau: "fp64", teacher_tau: "fp64", scale: "fp64", divisor: "fp64", divisor_tensor,
    row_stats, grad_loss, grad_loss_stride,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, blocks,
    F: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of R rows and C classes of the gradients, from the rows' statistics."""
    tile = tl.program_id(0).to(tl.int64)
    row = (tile // blocks) * R + tl.arange(0, R)
    k = (tile % blocks).to(tl.int32) * C + tl.arange(0, C)
    there = (row < rows)[:, None]
    row_weight = weight_of(weight, weight_stride, row, rows, F)
    used = row_weight != 0.0
    mask = used[:, None] & (k < classes)[None, :]
    s = load_tile(student, student_layout, row, k, mask, F)
    t = load_tile(teacher, teacher_layout, row, k, mask, F)
    ratio, _tau, inv_tau, student_log2, teacher_log2 = _temperatures(tau, teacher_tau, F)
    factor = grad_scale(divisor, divisor_tensor, F) * row_weight
    if grad_loss is not None:
        factor *= tl.load(grad_loss + row * grad_loss_stride, mask=row < rows, other=0.0).to(F)

    at = row_stats + row * 8
    t_max, s_max = tl.load(at, mask=used, other=0.0), tl.load(at + 1, mask=used, other=0.0)
    offset, centre = tl.load(at + 2, mask=used, other=0.0), tl.load(at + 3, mask=used, other=0.0)
    mean, kl = tl.load(at + 4, mask=used, other=0.0), tl.load(at + 5, mask=used, other=0.0)
    inv_s0, inv_z = tl.load(at + 6, mask=used, other=0.0), tl.load(at + 7, mask=used, other=0.0)

    w = teacher_weight(t, t_max[:, None], teacher_log2)
    x = difference(s, t, offset[:, None], centre[:, None], ratio, inv_tau)
    if grad_student is not None:
        v = student_weight(s, s_max[:, None], student_log2)
        for_student = factor * number(scale / tau, F)
        g = student_gradient(w, v, x - (mean + kl)[:, None], (for_student * inv_s0)[:, None], (for_student * inv_z)[:, None])
        store_gradient(grad_student, student_grad_layout, student_width, row, k, there, mask, g)
    if grad_teacher is not None:
        g = tl.where(w == 0.0, 0.0, w * (factor * number(scale / teacher_tau, F) * inv_s0)[:, None] * (mean[:, None] - x))
        store_gradient(grad_teacher, teacher_grad_layout, teacher_width, row, k, there, mask, g)


# ---- on the host -----------------------------------------------------------------------------------------------------------------


class KlDivTau(Call):
    stats = STATS

    def __init__(self, student: Tensor, teacher: Tensor, *rest: Any) -> None:
        *options, tau, teacher_tau, scale_by_tau_squared = rest
        super().__init__(student, teacher, *options)
        self.temperatures = (tau, teacher_tau, tau * tau if scale_by_tau_squared else 1.0)
        # sixteen bits a logit: differences are exact without an offset
        self.exact = student.element_size() == 2 and teacher.element_size() == 2 and tau == teacher_tau

    def launch_forward(
        self, loss: Tensor | None, row_stats: Tensor | None, gradient: Tensor | None, divisor: Divisor
    ) -> Tensor:
        per_row = loss is not None
        r, c, warps, resident = forward_tile(self.classes, self.dtype.itemsize, gradient is not None)
        programs = triton.cdiv(self.rows, r)
        if loss is None:
            loss = self.empty((programs,))
        if resident:
            rows_kernel[(programs,)](
                *self.inputs, *self.temperatures, *divisor, loss, row_stats, *gradient_args(gradient),
                F=self.F, EXACT=self.exact, PER_ROW=per_row, R=r, C=c, num_warps=warps,
            )  # fmt: skip
            return loss
        if row_stats is None:
            row_stats = self.empty((self.rows, STATS))
        online_kernel[(programs,)](
            *self.inputs, *self.temperatures, loss, row_stats, F=self.F, EXACT=self.exact, PER_ROW=per_row, C=c, num_warps=warps
        )
        if gradient is not None:
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
        r, c, warps = gradient_tile(width, self.dtype.itemsize)
        blocks = triton.cdiv(width, c)
        gradient_kernel[(triton.cdiv(self.rows, r) * blocks,)](
            *self.inputs, *self.temperatures, *divisor, row_stats,
            grad_loss, 0 if grad_loss is None or one_number(grad_loss) else 1,
            *gradient_args(grad_student), *gradient_args(grad_teacher), blocks,
            F=self.F, R=r, C=c, num_warps=warps,
        )  # fmt: skip


# A table rather than autotuning: a tile's width follows from the number of classes and from the registers (16 classes a thread leave
# room for two blocks a multiprocessor), so there is little to choose, and the choice is the same on every run.


def forward_tile(classes: int, itemsize: int, with_gradient: bool) -> tuple[int, int, int, bool]:
    """(rows a program, classes a tile, warps, whether a row lies in one tile)."""
    c = max(16, triton.next_power_of_2(classes))
    wide = itemsize // 4
    # Twice as long a row with its gradient does not fit the registers; without one, nothing is gained from keeping it.
    if c <= (8192 if with_gradient else 4096) // wide:
        warps = 1 if c == 1024 else 2 if c <= 32 else max(4, c * wide // 512)  # one warp for a row of 1k: no barriers
        return max(1, 1024 // c), c, warps, True
    return 1, 4096 // wide, 8, False


def gradient_tile(width: int, itemsize: int) -> tuple[int, int, int]:
    """(rows a program, classes a tile, warps). Nothing is shared but a row's statistics."""
    c = min(2048 // (itemsize // 4), max(16, triton.next_power_of_2(width)))
    return max(1, 1024 // c), c, 2 if c <= 32 else 4


OPERATORS = operators(KlDivTau)
