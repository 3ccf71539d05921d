"""softmax-KL at temperature tau in Triton: the operators kl_div_tau_* of csrc/ops.cpp, and the kernels of kd_loss.py with soft="kl".
kl_math.py has the formulas, cross_entropy.py those of the hard part.

A row of up to a few thousand classes lies in one program's registers, several rows in one where they are short: loss and gradient come
from one read. A longer row goes through block by block, and once more for its gradient: at once, from the L2 cache, where the rows of
all multiprocessors fit there.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kdfast.triton.autotune import Tile
from kdfast.triton.cross_entropy import STATS as HARD_STATS
from kdfast.triton.cross_entropy import (
    add_block,
    below,
    exponentials,
    hard_gradient,
    hard_of_row,
    load_hard_stats,
    others_of,
    store_hard_stats,
    target_of,
    with_hard,
)
from kdfast.triton.kl_math import (
    STABLE_BELOW,
    around,
    centred,
    difference,
    empty_part,
    excess_around_mean,
    frame_of_tile,
    loses_digits,
    loss_of_row,
    merge,
    near_limit,
    number,
    part_of_tile,
    ratio_less_one,
    rest_of,
    shift_of_ratio,
    student_gradient,
    teacher_gradient,
    temperatures,
    w_phi,
    weight,
    zero_if_masked,
)
from kdfast.triton.launch import (
    IN_L2,
    Call,
    Divisor,
    HardPart,
    aligned,
    grad_loss_of,
    grad_scale,
    gradient_args,
    load_tile,
    one_number,
    operators,
    row_offsets,
    store_gradient,
    store_loss,
    tiles_of_gradients,
    tiles_of_rows,
    weight_of,
)

STATS = 9  # KlStat of csrc/kl_math.h: t_max, s_max, s_offset, t_offset, centre, mean, shift, 1 / S0, 1 / Z


@triton.jit
def _store_stats(row_stats, row, mask, frame, mean, shift, inv_s0, inv_z, STATS: tl.constexpr):
    t_max, s_max, s_offset, t_offset, centre = frame
    at = row_stats + row * STATS
    tl.store(at, t_max, mask=mask)
    tl.store(at + 1, s_max, mask=mask)
    tl.store(at + 2, s_offset, mask=mask)
    tl.store(at + 3, t_offset, mask=mask)
    tl.store(at + 4, centre, mask=mask)
    tl.store(at + 5, mean, mask=mask)
    tl.store(at + 6, shift, mask=mask)
    tl.store(at + 7, inv_s0, mask=mask)
    tl.store(at + 8, inv_z, mask=mask)


@triton.jit
def _load_stats(row_stats, row, mask, STATS: tl.constexpr):
    at = row_stats + row * STATS
    frame = (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + 1, mask=mask, other=0.0),
        tl.load(at + 2, mask=mask, other=0.0),
        tl.load(at + 3, mask=mask, other=0.0),
        tl.load(at + 4, mask=mask, other=0.0),
    )
    mean, shift = tl.load(at + 5, mask=mask, other=0.0), tl.load(at + 6, mask=mask, other=0.0)
    return frame, mean, shift, tl.load(at + 7, mask=mask, other=0.0), tl.load(at + 8, mask=mask, other=0.0)


@triton.jit
def _store_gradients(
    w, v, y, mean, shift, inv_s0, inv_z, used, factor, hard, for_student, for_teacher, row, k, rows, classes,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width,
    F: tl.constexpr, HARD: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients that are wanted. hard: the hard part's. The numbers of a row that is not used may be anything."""
    p_factor, q_factor = tl.where(used, factor * inv_s0, 0.0), tl.where(used, factor * inv_z, 0.0)
    if grad_student is not None:
        f = number(for_student, F)
        near = near_limit(shift)[:, None]
        g = student_gradient(w, v, y - shift[:, None], near, (f * p_factor)[:, None], (f * q_factor)[:, None])
        g = with_hard(g, hard, HARD)
        store_gradient(grad_student, student_grad_layout, student_width, row, k, rows, classes, g, V, PADDED)
    if grad_teacher is not None:
        mean = tl.where(used, mean, 0.0)
        g = teacher_gradient(w, y - mean[:, None], (number(for_teacher, F) * p_factor)[:, None])
        if HARD == "alone":
            g = tl.zeros_like(w)
        store_gradient(grad_teacher, teacher_grad_layout, teacher_width, row, k, rows, classes, g, V, PADDED)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    student, student_layout, teacher, teacher_layout, row_weight, weight_stride, rows, classes,
    ratio: "fp64", inv_tau: "fp64", student_log2: "fp64", teacher_log2: "fp64", scale: "fp64", for_student: "fp64", for_teacher: "fp64",
    divisor: "fp64", divisor_tensor,
    target, target_stride, ignore_index, smoothing: "fp64", hard_divisor: "fp64", hard_divisor_tensor, hard_loss,
    loss, row_stats, grad_loss, grad_loss_stride,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width,
    F: tl.constexpr, READ: tl.constexpr, STATS: tl.constexpr, HARD: tl.constexpr, SMOOTHED: tl.constexpr, SHARED: tl.constexpr,
    PER_ROW: tl.constexpr, R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """R whole rows: what is wanted of their loss, statistics and gradients."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    k = tl.arange(0, C)
    factor = weight_of(row_weight, weight_stride, row, rows, F)
    used = factor != 0.0
    mask = used[:, None] & (k < aligned(classes, V))[None, :]
    s = load_tile(student, student_layout, row, k, mask, F, V)
    t = load_tile(teacher, teacher_layout, row, k, mask, F, V)
    temps = temperatures(ratio, inv_tau, student_log2, teacher_log2, F)
    frame, infinite, w, top = frame_of_tile(s, t, temps, READ)
    v = weight(s, frame[1][:, None], temps[2])
    y = centred(s, t, frame, temps, READ)
    rest = rest_of(frame, frame[1], frame[0], temps, READ)
    s0, z = tl.sum(w, 1), tl.sum(v, 1)
    mean = tl.sum(w * y, 1) / s0
    excess = excess_around_mean(tl.sum(w_phi(w, v, y, tl.exp(rest)[:, None]), 1), mean, s0)
    kl, mean, shift = loss_of_row(rest, mean, s0, z, excess, infinite)
    if row_stats is not None or grad_student is not None or grad_teacher is not None:
        lost = loses_digits(kl, shift - (top - frame[4]) * temps[1])
        frame, mean, shift = around(tl.where(lost, top, frame[4]), frame, mean, shift, temps)
        if tl.max(lost.to(tl.int32), 0) == 1:
            s_again = load_tile(student, student_layout, row, k, mask, F, V)  # rather than have registers for it in every row
            t_again = load_tile(teacher, teacher_layout, row, k, mask, F, V)
            w, v = weight(t_again, frame[0][:, None], temps[3]), weight(s_again, frame[1][:, None], temps[2])
            y = centred(s_again, t_again, frame, temps, READ)
            exp_rest = tl.exp(rest_of(frame, frame[1], frame[0], temps, READ))[:, None]
            less_one = tl.sum(ratio_less_one(w, v, y, exp_rest), 1) / s0
            shift = tl.where(lost, shift_of_ratio(less_one, shift), shift)
    hard = None
    if HARD != "":
        column, counts = target_of(target, target_stride, ignore_index, row, rows, classes, used)
        e = v if SHARED else exponentials(s, frame[1])
        s_target = tl.sum(tl.where(k[None, :] == column[:, None], s, 0.0), 1)
        below_mean = None
        if SMOOTHED:
            below_mean = tl.sum(below(s, frame[1], mask), 1) / classes
        others = tl.sum(others_of(e, k, column), 1)
        hard_value, hard_inv_z, slope = hard_of_row(frame[1], s_target, column, others, below_mean, smoothing, F)
        if hard_loss is not None:
            store_loss(hard_loss, row, rows, tl.where(counts, hard_value * factor, 0.0), PER_ROW)
        if row_stats is not None:
            store_hard_stats(row_stats, row * STATS + (STATS - HARD_STATS), row < rows, counts, frame[1], hard_inv_z, slope)
    if loss is not None:
        store_loss(loss, row, rows, tl.where(used, kl * number(scale, F) * factor, 0.0), PER_ROW)
    if row_stats is not None:
        _store_stats(row_stats, row, row < rows, frame, mean, shift, 1.0 / s0, 1.0 / z, STATS)
    if grad_student is not None or grad_teacher is not None:
        factor *= grad_loss_of(grad_loss, grad_loss_stride, row, rows, F)
        if HARD != "":
            hard_factor = factor * grad_scale(hard_divisor, hard_divisor_tensor, F)
            hard = hard_gradient(e, k, column, counts, hard_inv_z, slope, hard_factor, smoothing, classes, F)
        factor *= grad_scale(divisor, divisor_tensor, F)
        width = tl.maximum(student_width, teacher_width) if PADDED else 1  # beyond the first tile all is padding
        for start in range(0, width, C):
            _store_gradients(
                w, v, y, mean, shift, 1.0 / s0, 1.0 / z, used, factor, hard, for_student, for_teacher, row, start + k, rows, classes,
                grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, F, HARD, V, PADDED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def blocks_kernel(
    student, student_layout, teacher, teacher_layout, row_weight, weight_stride, rows, classes,
    ratio: "fp64", inv_tau: "fp64", student_log2: "fp64", teacher_log2: "fp64", scale: "fp64", for_student: "fp64", for_teacher: "fp64",
    divisor: "fp64", divisor_tensor,
    target, target_stride, ignore_index, smoothing: "fp64", hard_divisor: "fp64", hard_divisor_tensor, hard_loss,
    loss, row_stats, grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width,
    F: tl.constexpr, READ: tl.constexpr, STATS: tl.constexpr, HARD: tl.constexpr, SMOOTHED: tl.constexpr,
    PER_ROW: tl.constexpr, C: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One row, block by block: its loss, and what is wanted of its statistics and gradients."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    k = tl.arange(0, C)
    factor = weight_of(row_weight, weight_stride, row, rows, F)
    used = factor != 0.0
    end = aligned(classes, V)
    temps = temperatures(ratio, inv_tau, student_log2, teacher_log2, F)

    # All blocks in the frame of the first: nothing passes between threads until the end.
    mask = used[:, None] & (k < end)[None, :]
    s = load_tile(student, student_layout, row, k, mask, F, V)
    t = load_tile(teacher, teacher_layout, row, k, mask, F, V)
    frame, _infinite, s0, _top = frame_of_tile(s, t, temps, READ)
    rest = rest_of(frame, frame[1], frame[0], temps, READ)
    exp_rest = tl.exp(rest)[:, None]
    y, z = centred(s, t, frame, temps, READ), weight(s, frame[1][:, None], temps[2])
    s1, excess = s0 * y, w_phi(s0, z, y, exp_rest)
    s2 = s1 * y  # from the left: at a class that the teacher masks y * y overflows
    if HARD != "":
        column, counts = target_of(target, target_stride, ignore_index, row, rows, classes, used)
        s_target = tl.load(student + row_offsets(row, student_layout, V) + column, mask=column >= 0, other=-float("inf")).to(F)
        hard_top = tl.maximum(frame[1], s_target)
        others = others_of(exponentials(s, hard_top), k, column)
        if SMOOTHED:
            below_top = below(s, hard_top, mask)
    for start in range(C, classes, C):
        mask = used[:, None] & (start + k < end)[None, :]
        s = load_tile(student, student_layout, row, start + k, mask, F, V)
        t = load_tile(teacher, teacher_layout, row, start + k, mask, F, V)
        w, v = weight(t, frame[0][:, None], temps[3]), weight(s, frame[1][:, None], temps[2])
        y = centred(s, t, frame, temps, READ)
        s0 += w
        s1 += w * y
        s2 += w * y * y
        z += v
        excess += w_phi(w, v, y, exp_rest)
        if HARD != "":
            others += others_of(exponentials(s, hard_top), start + k, column)
            if SMOOTHED:
                below_top += below(s, hard_top, mask)
    s0, z = tl.sum(s0, 1), tl.sum(z, 1)
    mean = tl.sum(s1, 1) / s0
    excess = tl.sum(excess, 1)
    around_mean = excess_around_mean(excess, mean, s0)
    kl, mean, shift = loss_of_row(rest, mean, s0, z, around_mean, 0.0)
    # Not where the loss is infinite, nor where the first block stands so far off that what is left around the mean has lost more than
    # three bits.
    variance = tl.sum(s2, 1) / s0 - mean * mean
    good = (kl - kl == 0.0) & (s0 > 1e-4) & (s0 < 1e8) & (z > 1e-4) & (z < 1e8) & (variance >= 0.125 * mean * mean)
    good &= (kl >= STABLE_BELOW) | (around_mean * s0 * 9.0 >= excess * tl.exp(-mean))

    if HARD != "":
        hard_others = tl.sum(others, 1)
        hard_z = hard_others + tl.exp(s_target - hard_top)
        good &= ~counts | ((hard_z > 1e-4) & (hard_z < 1e8))
        m_top, m_others = s_target, tl.zeros_like(rest)

    # Else every block in its own frame, merged.
    if tl.max((used & ~good).to(tl.int32), 0) == 1:
        part = empty_part(rest)
        for start in range(0, classes, C):
            mask = used[:, None] & (start + k < end)[None, :]
            s = load_tile(student, student_layout, row, start + k, mask, F, V)
            t = load_tile(teacher, teacher_layout, row, start + k, mask, F, V)
            part = merge(part, part_of_tile(s, t, temps, READ), temps, READ)
            if HARD != "":
                m_top, m_others = add_block(m_top, m_others, s, start + k, column)
        frame, rest, mean, s0, z, excess, infinite = part
        excess = excess * tl.exp(tl.maximum(rest - mean, 0.0)) / s0
        kl, mean, shift = loss_of_row(rest, mean, s0, z, excess, infinite)
    inv_s0, inv_z = 1.0 / s0, 1.0 / z

    if row_stats is not None or grad_student is not None or grad_teacher is not None:
        # Where student and teacher agree but for a class far off, the variance is much more than twice the loss.
        far = used & (~good | (variance > 16.0 * kl) | (mean * mean > kl))
        again = tl.where(tl.max(far.to(tl.int32), 0) == 1, classes, 0)
        t_top, s_top = tl.full([1], -float("inf"), F), tl.full([1], -float("inf"), F)
        for start in range(0, again, C):
            mask = used[:, None] & (start + k < end)[None, :]
            s = load_tile(student, student_layout, row, start + k, mask, F, V)
            t = load_tile(teacher, teacher_layout, row, start + k, mask, F, V)
            t_max = tl.maximum(t_top, tl.max(t, 1))
            s_top = tl.maximum(
                tl.where(t_top == t_max, s_top, -float("inf")), tl.max(tl.where(t == t_max[:, None], s, -float("inf")), 1)
            )
            t_top = t_max
        top = difference(zero_if_masked(s_top), zero_if_masked(t_top), frame[2], frame[3], temps, READ)
        frame, mean, shift = around(tl.where(far, top, frame[4]), frame, mean, shift, temps)
        exp_rest = tl.exp(rest_of(frame, frame[1], frame[0], temps, READ))[:, None]
        less_one = tl.zeros([1, C], F)
        for start in range(0, again, C):
            mask = used[:, None] & (start + k < end)[None, :]
            s = load_tile(student, student_layout, row, start + k, mask, F, V)
            t = load_tile(teacher, teacher_layout, row, start + k, mask, F, V)
            w, v = weight(t, frame[0][:, None], temps[3]), weight(s, frame[1][:, None], temps[2])
            less_one += ratio_less_one(w, v, centred(s, t, frame, temps, READ), exp_rest)
        shift = tl.where(far, shift_of_ratio(tl.sum(less_one, 1) * inv_s0, shift), shift)

    store_loss(loss, row, rows, tl.where(used, kl * number(scale, F) * factor, 0.0), PER_ROW)
    if HARD != "":
        new_top = tl.where(good, hard_top, zero_if_masked(m_top))
        below_mean = None
        if SMOOTHED:
            below_mean = tl.sum(below_top, 1) / classes + (new_top - hard_top)
        hard_others = tl.where(good, hard_others, m_others)
        hard_value, hard_inv_z, slope = hard_of_row(new_top, s_target, column, hard_others, below_mean, smoothing, F)
        store_loss(hard_loss, row, rows, tl.where(counts, hard_value * factor, 0.0), PER_ROW)
        if row_stats is not None:
            store_hard_stats(row_stats, row * STATS + (STATS - HARD_STATS), row < rows, counts, new_top, hard_inv_z, slope)
    if row_stats is not None:
        _store_stats(row_stats, row, row < rows, frame, mean, shift, inv_s0, inv_z, STATS)
    if grad_student is not None or grad_teacher is not None:
        hard_factor = factor * grad_scale(hard_divisor, hard_divisor_tensor, F)
        factor *= grad_scale(divisor, divisor_tensor, F)
        blocks = tl.cdiv(tl.maximum(student_width, teacher_width), C)
        for block in range(blocks):
            at = (blocks - 1 - block) * C + k  # the last one is the likeliest to be in the cache still
            mask = used[:, None] & (at < end)[None, :]
            s = load_tile(student, student_layout, row, at, mask, F, V)
            t = load_tile(teacher, teacher_layout, row, at, mask, F, V)
            w, v = weight(t, frame[0][:, None], temps[3]), weight(s, frame[1][:, None], temps[2])
            y = centred(s, t, frame, temps, READ)
            hard = None
            if HARD != "":
                e = exponentials(s, new_top)
                hard = hard_gradient(e, at, column, counts, hard_inv_z, slope, hard_factor, smoothing, classes, F)
            _store_gradients(
                w, v, y, mean, shift, inv_s0, inv_z, used, factor, hard, for_student, for_teacher, row, at, rows, classes,
                grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, F, HARD, V, PADDED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    student, student_layout, teacher, teacher_layout, row_weight, weight_stride, rows, classes,
    ratio: "fp64", inv_tau: "fp64", student_log2: "fp64", teacher_log2: "fp64", scale: "fp64", for_student: "fp64", for_teacher: "fp64",
    divisor: "fp64", divisor_tensor,
    target, target_stride, ignore_index, smoothing: "fp64", hard_divisor: "fp64", hard_divisor_tensor, hard_loss,
    row_stats, grad_loss, grad_loss_stride,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, blocks,
    F: tl.constexpr, READ: tl.constexpr, STATS: tl.constexpr, HARD: tl.constexpr, SMOOTHED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A tile of R rows and C classes of the gradients, from the rows' statistics."""
    tile = tl.program_id(0).to(tl.int64)
    row = (tile // blocks) * R + tl.arange(0, R)
    k = (tile % blocks).to(tl.int32) * C + tl.arange(0, C)
    factor = weight_of(row_weight, weight_stride, row, rows, F)
    used = factor != 0.0
    mask = used[:, None] & (k < aligned(classes, V))[None, :]
    s = load_tile(student, student_layout, row, k, mask, F, V)
    t = load_tile(teacher, teacher_layout, row, k, mask, F, V)
    frame, mean, shift, inv_s0, inv_z = _load_stats(row_stats, row, used, STATS)
    factor *= grad_loss_of(grad_loss, grad_loss_stride, row, rows, F)
    hard = None
    if HARD != "":
        column, counts = target_of(target, target_stride, ignore_index, row, rows, classes, used)
        top, hard_inv_z, slope = load_hard_stats(row_stats, row * STATS + (STATS - HARD_STATS), used)
        hard_factor = factor * grad_scale(hard_divisor, hard_divisor_tensor, F)
        e = exponentials(s, top)
        hard = hard_gradient(e, k, column, counts, hard_inv_z, slope, hard_factor, smoothing, classes, F)
    factor *= grad_scale(divisor, divisor_tensor, F)
    temps = temperatures(ratio, inv_tau, student_log2, teacher_log2, F)
    w, v = weight(t, frame[0][:, None], temps[3]), weight(s, frame[1][:, None], temps[2])
    y = centred(s, t, frame, temps, READ)
    _store_gradients(
        w, v, y, mean, shift, inv_s0, inv_z, used, factor, hard, for_student, for_teacher, row, k, rows, classes,
        grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, F, HARD, V, PADDED,
    )  # fmt: skip


# ---- on the host -----------------------------------------------------------------------------------------------------------------


class KlDivTau(Call):
    stats = STATS

    def __init__(self, student: Tensor, teacher: Tensor, *rest: Any, hard: HardPart | None = None) -> None:
        *options, tau, teacher_tau, scale_by_tau_squared = rest
        super().__init__(student, teacher, *options)
        self.hard = hard
        if hard is not None:
            self.stats = STATS + HARD_STATS.value
        self.constants |= {"STATS": self.stats, **self.hard_constants()}
        self.shared = hard is not None and tau == 1  # the exponentials of the parts
        scale = tau * tau if scale_by_tau_squared else 1.0
        log2_e = 1 / math.log(2)
        self.temperatures = (
            tau / teacher_tau, 1 / tau, log2_e / tau, log2_e / teacher_tau, scale, scale / tau, scale / teacher_tau
        )  # fmt: skip
        sixteen_bits = self.sixteen_bits = student.element_size() == 2 and teacher.element_size() == 2
        self.constants["READ"] = "scaled" if tau != teacher_tau else "exact" if sixteen_bits else "shifted"

    def launch_forward(
        self,
        loss: Tensor | None,
        row_stats: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
        divisor: Divisor,
    ) -> Tensor:
        per_row, gradients = loss is not None, (grad_student, grad_teacher)
        count = sum(x is not None for x in gradients)
        tiles, resident = forward_tiles(self.classes, self.dtype.itemsize, count, self.hard is not None, self.sixteen_bits)
        if resident:
            row_stats = None if self.forgetful else row_stats
            given = per_row, None, divisor
            tile = self.tile(tiles, KlDivTau.launch_rows, given, True, row_stats, *gradients)
            loss = self.empty((triton.cdiv(self.rows, tile.rows),)) if loss is None else loss
            self.launch_rows(tile, *given, loss, row_stats, *gradients)
            return loss
        loss = self.empty((self.rows,)) if loss is None else loss
        at_once = gradients if self.row_bytes <= IN_L2 else (None, None)
        if row_stats is None and grad_student is not at_once[0]:
            row_stats = self.empty((self.rows, self.stats))
        tile = self.tile(tiles, KlDivTau.launch_blocks, (per_row, divisor), True, row_stats, *at_once)
        self.launch_blocks(tile, per_row, divisor, loss, row_stats, *at_once)
        if grad_student is not at_once[0]:
            assert row_stats is not None
            self.launch_gradients(row_stats, None, *gradients, divisor)
        return loss

    def launch_gradients(
        self,
        row_stats: Tensor,
        grad_loss: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
        divisor: Divisor,
    ) -> None:
        if self.forgetful:
            tiles, _ = forward_tiles(self.classes, self.dtype.itemsize, 2, self.hard is not None, self.sixteen_bits)
            rest = False, grad_loss, divisor
            tile = self.tile(tiles, KlDivTau.launch_rows, rest, None, None, grad_student, grad_teacher)
            self.launch_rows(tile, *rest, None, None, grad_student, grad_teacher)
            return
        given = row_stats, grad_loss, divisor
        tiles = tiles_of_gradients(max(g.shape[-1] for g in (grad_student, grad_teacher) if g is not None), self.dtype.itemsize)
        tile = self.tile(tiles, KlDivTau.launch_tiles, given, grad_student, grad_teacher)
        self.launch_tiles(tile, *given, grad_student, grad_teacher)

    def launch_rows(
        self,
        tile: Tile,
        per_row: bool,
        grad_loss: Tensor | None,
        divisor: Divisor,
        loss: Tensor | None,
        row_stats: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
    ) -> None:
        rows_kernel[(triton.cdiv(self.rows, tile.rows),)](
            *self.inputs, *self.temperatures, *divisor,
            *self.hard_args(grad_student is not None or grad_teacher is not None, loss), loss, row_stats,
            grad_loss, 0 if grad_loss is None or one_number(grad_loss) else 1,
            *gradient_args(grad_student), *gradient_args(grad_teacher),
            **self.constants, SHARED=self.shared, PER_ROW=per_row, R=tile.rows, C=tile.classes, num_warps=tile.warps,
        )  # fmt: skip

    def launch_blocks(
        self,
        tile: Tile,
        per_row: bool,
        divisor: Divisor,
        loss: Tensor,
        row_stats: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
    ) -> None:
        blocks_kernel[(self.rows,)](
            *self.inputs, *self.temperatures, *divisor, *self.hard_args(grad_student is not None, loss),
            loss, row_stats, *gradient_args(grad_student), *gradient_args(grad_teacher),
            **self.constants, PER_ROW=per_row, C=tile.classes, num_warps=tile.warps,
        )  # fmt: skip

    def launch_tiles(
        self,
        tile: Tile,
        row_stats: Tensor,
        grad_loss: Tensor | None,
        divisor: Divisor,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
    ) -> None:
        width = max(g.shape[-1] for g in (grad_student, grad_teacher) if g is not None)
        blocks = triton.cdiv(width, tile.classes)
        gradient_kernel[(triton.cdiv(self.rows, tile.rows) * blocks,)](
            *self.inputs, *self.temperatures, *divisor, *self.hard_args(True, None), row_stats,
            grad_loss, 0 if grad_loss is None or one_number(grad_loss) else 1,
            *gradient_args(grad_student), *gradient_args(grad_teacher), blocks,
            **self.constants, R=tile.rows, C=tile.classes, num_warps=tile.warps,
        )  # fmt: skip


def forward_tiles(classes: int, itemsize: int, gradients: int, hard: bool, sixteen_bits: bool) -> tuple[tuple[Tile, ...], bool]:
    """Tiles, and whether a row lies in one."""
    c = max(16, triton.next_power_of_2(classes))
    double = itemsize == 8
    # Without a gradient nothing is gained from keeping a longer row; a second one takes registers, as do the hard part's exponentials
    # and logits of float32.
    largest = 4096 if double or gradients == 0 else min(16384 // gradients, 16384 if sixteen_bits else 8192)
    if c <= (largest // 2 if hard else largest):
        return tiles_of_rows(c, itemsize), True
    if double:
        return (Tile(1, 1024 if hard else 2048, 8),), False
    return (Tile(1, 2048, 8), Tile(1, 4096, 8), Tile(1, 4096, 16)), False


OPERATORS = operators(KlDivTau)
