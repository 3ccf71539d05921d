"""Squared difference of the logits in Triton: the operators logit_mse_* of csrc/ops.cpp, and the kernels of logit_huber.py and of
kd_loss.py with soft="mse".

Without `center` a row needs nothing of itself: loss and gradient come from one read at any number of classes. With it, or with the hard
part of kd_loss, a row of up to a few thousand classes lies in one program's registers, and a longer one goes through block by block, and
once more for its gradient: at once, from the L2 cache, where the rows of all multiprocessors fit there.
"""

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
    store_hard_stats,
    target_of,
    with_hard,
)
from kdfast.triton.kl_math import largest_finite, number, row_offset, zero_if_masked
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

STATS = 4  # MseStat of csrc/kl_math.h: s_offset, t_offset, mean, 1 / classes counted; with `center` only

# KIND, the function of the differences that is summed, and which constant factor it leaves to `scale`:
#   "square"     d^2
#   "pseudo"     delta (sqrt(1 + (d / delta)^2) - 1)           times delta
#   "smooth_l1"  d^2 / (2 delta) where |d| < delta, else |d| - delta / 2


@triton.jit
def _in_deltas(d, delta, F: tl.constexpr, KIND: tl.constexpr):
    """d / delta, up to where the function is a straight line. NaN for NaN."""
    bound: tl.constexpr = 1.0 if KIND == "smooth_l1" else 1e18
    r = d * number(1.0 / delta, F)
    return tl.where(r > bound, bound, tl.where(r < -bound, -bound, r))


@triton.jit
def _value(d, delta, F: tl.constexpr, KIND: tl.constexpr):
    if KIND == "square":
        return d * d
    else:
        r = _in_deltas(d, delta, F, KIND)
        if KIND == "pseudo":
            return d * (r / (tl.sqrt(r * r + 1.0) + 1.0))  # without the cancellation
        else:
            return r * (d - r * number(0.5 * delta, F))


@triton.jit
def _slope(d, delta, F: tl.constexpr, KIND: tl.constexpr):
    """The derivative of _value."""
    if KIND == "square":
        return d + d
    else:
        r = _in_deltas(d, delta, F, KIND)
        if KIND == "pseudo":
            return r / tl.sqrt(r * r + 1.0)
        else:
            return r


@triton.jit
def _differences(s, t):
    """d, 0 for a class at -inf on both sides, which does not count; and whether it does."""
    counts = (s != -float("inf")) | (t != -float("inf"))
    return tl.where(counts, s - t, 0.0), counts


@triton.jit
def _sum_of(d, counts):
    """The sum of a tile's differences; 0 where it is infinite: around any finite mean so is the loss, and NaN only where a logit is."""
    total = tl.sum(tl.where(counts, d, 0.0), 1)
    return tl.where(tl.abs(total) == float("inf"), 0.0, total)


@triton.jit
def _offsets(s, t, F: tl.constexpr):
    """(s_offset, t_offset): the mean difference, rounded, on the side of the larger logits."""
    d, counts = _differences(s, t)
    mean = _sum_of(d, counts) / tl.maximum(tl.sum(counts.to(F), 1), 1.0)
    s_size, t_size = largest_finite(s), largest_finite(t)
    offset = row_offset(mean, tl.maximum(s_size, t_size))
    return tl.where(s_size >= t_size, offset, 0.0), tl.where(s_size >= t_size, 0.0, -offset)


@triton.jit
def _moments(s, t, s_offset, t_offset, F: tl.constexpr):
    """Of a tile's rows: the differences less the offset, which classes count and how many, the mean of the differences, the sum of
    their squares around it."""
    d, counts = _differences(s - s_offset[:, None], t - t_offset[:, None])
    n = tl.sum(counts.to(F), 1)
    some = tl.maximum(n, 1.0)
    mean = _sum_of(d, counts) / some
    left = tl.where(counts, d - mean[:, None], 0.0)
    shift = _sum_of(left, counts) / some
    # A row with NaN or +inf is NaN altogether; -inf on one side alone makes its loss +inf.
    top = tl.max(tl.maximum(s, t), 1)
    nan = tl.where(top == float("inf"), float("nan"), 0.0)
    return d, counts, n, mean + shift + nan, tl.sum(left * left, 1) - n * shift * shift + nan


@triton.jit
def _part(s, t, s_offset, t_offset, F: tl.constexpr, CENTER: tl.constexpr):
    """_moments; those around 0 without `center`."""
    if CENTER:
        return _moments(s, t, s_offset, t_offset, F)
    else:
        d, counts = _differences(s, t)
        return d, counts, tl.sum(counts.to(F), 1), tl.zeros_like(s_offset), tl.sum(d * d, 1)


@triton.jit
def _store_gradients(
    g, hard, row, k, rows, classes,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width,
    HARD: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients that are wanted. g: the student's of the soft part; hard: of the hard part."""
    if grad_teacher is not None:
        for_teacher = tl.zeros_like(g) if HARD == "alone" else -g
        store_gradient(grad_teacher, teacher_grad_layout, teacher_width, row, k, rows, classes, for_teacher, V, PADDED)
    if grad_student is not None:
        g = with_hard(g, hard, HARD)
        store_gradient(grad_student, student_grad_layout, student_width, row, k, rows, classes, g, V, PADDED)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    student, student_layout, teacher, teacher_layout, row_weight, weight_stride, rows, classes,
    scale: "fp64", delta: "fp64", divisor: "fp64", divisor_tensor, loss,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width,
    F: tl.constexpr, KIND: tl.constexpr, PER_ROW: tl.constexpr, R: tl.constexpr, C: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """R rows without `center`: their loss and the gradients that are wanted."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    weight = weight_of(row_weight, weight_stride, row, rows, F)
    used = weight != 0.0
    factor = number(scale, F) * weight
    total = tl.zeros([R, C], F)
    for start in range(0, tl.maximum(classes, tl.maximum(student_width, teacher_width)), C):
        k = start + tl.arange(0, C)
        mask = used[:, None] & (k < aligned(classes, V))[None, :]
        s = load_tile(student, student_layout, row, k, mask, F, V)
        t = load_tile(teacher, teacher_layout, row, k, mask, F, V)
        d, _counts = _differences(s, t)
        total += _value(d, delta, F, KIND)
        if grad_student is not None or grad_teacher is not None:
            g = _slope(d, delta, F, KIND) * (factor * grad_scale(divisor, divisor_tensor, F))[:, None]
            _store_gradients(
                g, None, row, k, rows, classes,
                grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, "", V, PADDED,
            )  # fmt: skip
    store_loss(loss, row, rows, tl.where(used, tl.sum(total, 1) * factor, 0.0), PER_ROW)


@triton.jit(do_not_specialize=["rows"])
def row_kernel(
    student, student_layout, teacher, teacher_layout, row_weight, weight_stride, rows, classes,
    scale: "fp64", delta: "fp64", divisor: "fp64", divisor_tensor,
    target, target_stride, ignore_index, smoothing: "fp64", hard_divisor: "fp64", hard_divisor_tensor, hard_loss,
    loss, row_stats, grad_loss, grad_loss_stride,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width,
    F: tl.constexpr, KIND: tl.constexpr, STATS: tl.constexpr, CENTER: tl.constexpr, PER_CLASS: tl.constexpr,
    HARD: tl.constexpr, SMOOTHED: tl.constexpr, PER_ROW: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr, RESIDENT: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """R rows with `center` or a hard part: their loss, and what is wanted of their statistics and gradients.
    EXACT: sixteen bits a logit, whose differences need no offset."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    weight = weight_of(row_weight, weight_stride, row, rows, F)
    used = weight != 0.0
    end = aligned(classes, V)
    k = tl.arange(0, C)
    s_offset, t_offset = tl.zeros([R], F), tl.zeros([R], F)
    if HARD != "":
        column, counts_hard = target_of(target, target_stride, ignore_index, row, rows, classes, used)
        s_target = tl.load(student + row_offsets(row, student_layout, V) + column, mask=column >= 0, other=-float("inf")).to(F)
        top, others = s_target, tl.zeros([R], F)
        first_top, below_sum = zero_if_masked(top), tl.zeros([R], F)
    if RESIDENT:
        mask = used[:, None] & (k < end)[None, :]
        s = load_tile(student, student_layout, row, k, mask, F, V)
        t = load_tile(teacher, teacher_layout, row, k, mask, F, V)
        if CENTER and not EXACT:
            s_offset, t_offset = _offsets(s, t, F)
        d, counts, n, mean, total = _part(s, t, s_offset, t_offset, F, CENTER)
        d = tl.where(counts, d - mean[:, None], 0.0)
        if HARD != "":
            top, others = add_block(top, others, s, k, column)
            if SMOOTHED:
                below_sum += tl.sum(below(s, first_top, mask), 1)
    else:
        n, mean, total = tl.zeros([R], F), tl.zeros([R], F), tl.zeros([R], F)
        for start in range(0, classes, C):
            mask = used[:, None] & (start + k < end)[None, :]
            s = load_tile(student, student_layout, row, start + k, mask, F, V)
            t = load_tile(teacher, teacher_layout, row, start + k, mask, F, V)
            if CENTER and not EXACT:  # those of the first block with any class
                s_new, t_new = _offsets(s, t, F)
                s_offset, t_offset = tl.where(n == 0.0, s_new, s_offset), tl.where(n == 0.0, t_new, t_offset)
            _d, _counts, block_n, block_mean, block_squares = _part(s, t, s_offset, t_offset, F, CENTER)
            # Two parts of a row as one: all terms are positive.
            share = block_n / tl.maximum(n + block_n, 1.0)
            apart = tl.where(n > 0.0, block_mean - mean, 0.0)
            total += block_squares + apart * apart * (n * share)
            mean = tl.where(n > 0.0, mean + apart * share, block_mean)
            n += block_n
            if HARD != "":
                top, others = add_block(top, others, s, start + k, column)
                if SMOOTHED:
                    below_sum += tl.sum(below(s, first_top, mask), 1)
    row_scale = number(scale, F)
    inv_n = 1.0 / n
    mean_slope = tl.zeros([R], F)  # of the squares
    if KIND != "square":
        if RESIDENT:
            total = tl.sum(_value(d, delta, F, KIND), 1)
            mean_slope = tl.sum(_slope(d, delta, F, KIND), 1)
        else:
            total = tl.zeros([R], F)
            for start in range(0, classes, C):
                mask = used[:, None] & (start + k < end)[None, :]
                s = load_tile(student, student_layout, row, start + k, mask, F, V)
                t = load_tile(teacher, teacher_layout, row, start + k, mask, F, V)
                d, counts = _differences(s - s_offset[:, None], t - t_offset[:, None])
                d = tl.where(counts, d - mean[:, None], 0.0)
                total += tl.sum(_value(d, delta, F, KIND), 1)
                mean_slope += tl.sum(_slope(d, delta, F, KIND), 1)
        mean_slope *= inv_n
    if PER_CLASS:
        row_scale = row_scale * inv_n
    if HARD != "":
        top = zero_if_masked(top)
        below_mean = None
        if SMOOTHED:
            below_mean = below_sum / classes + (top - first_top)
        hard_value, hard_inv_z, hard_slope = hard_of_row(top, s_target, column, others, below_mean, smoothing, F)
        if hard_loss is not None:
            store_loss(hard_loss, row, rows, tl.where(counts_hard, hard_value * weight, 0.0), PER_ROW)
    if loss is not None:
        store_loss(loss, row, rows, tl.where(used, total * row_scale * weight, 0.0), PER_ROW)
    if row_stats is not None:
        at = row_stats + row * STATS
        tl.store(at, s_offset, mask=row < rows)
        tl.store(at + 1, t_offset, mask=row < rows)
        tl.store(at + 2, mean, mask=row < rows)
        tl.store(at + 3, inv_n, mask=row < rows)
        if KIND != "square":
            tl.store(at + 4, mean_slope, mask=row < rows)
        if HARD != "":
            store_hard_stats(
                row_stats, row * STATS + (STATS - HARD_STATS), row < rows, counts_hard, top, hard_inv_z, hard_slope
            )
    if grad_student is not None or grad_teacher is not None:
        width = tl.maximum(student_width, teacher_width)
        weight *= grad_loss_of(grad_loss, grad_loss_stride, row, rows, F)
        factor = tl.where(used, grad_scale(divisor, divisor_tensor, F) * weight * row_scale, 0.0)
        hard_factor = weight * grad_scale(hard_divisor, hard_divisor_tensor, F)
        if RESIDENT:
            hard = None
            g = tl.where(counts, (_slope(d, delta, F, KIND) - mean_slope[:, None]) * factor[:, None], 0.0)
            if HARD != "":
                e = exponentials(s, top)
                hard = hard_gradient(e, k, column, counts_hard, hard_inv_z, hard_slope, hard_factor, smoothing, classes, F)
            for start in range(0, width if PADDED else 1, C):  # beyond the first tile all is padding
                _store_gradients(
                    g, hard, row, start + k, rows, classes,
                    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, HARD, V, PADDED,
                )  # fmt: skip
        else:
            blocks = tl.cdiv(width, C)
            for block in range(blocks):
                at = (blocks - 1 - block) * C + k  # the last one is the likeliest to be in the cache still
                mask = used[:, None] & (at < end)[None, :]
                s = load_tile(student, student_layout, row, at, mask, F, V)
                t = load_tile(teacher, teacher_layout, row, at, mask, F, V)
                d, counts = _differences(s - s_offset[:, None], t - t_offset[:, None])
                slope = _slope(d - mean[:, None], delta, F, KIND) - mean_slope[:, None]
                g = tl.where(counts, slope * factor[:, None], 0.0)
                hard = None
                if HARD != "":
                    e = exponentials(s, top)
                    hard = hard_gradient(e, at, column, counts_hard, hard_inv_z, hard_slope, hard_factor, smoothing, classes, F)
                _store_gradients(
                    g, hard, row, at, rows, classes,
                    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, HARD, V, PADDED,
                )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    student, student_layout, teacher, teacher_layout, row_weight, weight_stride, rows, classes,
    scale: "fp64", delta: "fp64", divisor: "fp64", divisor_tensor,
    target, target_stride, ignore_index, smoothing: "fp64", hard_divisor: "fp64", hard_divisor_tensor, hard_loss,
    row_stats, grad_loss, grad_loss_stride,
    grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width, blocks,
    F: tl.constexpr, KIND: tl.constexpr, STATS: tl.constexpr, CENTER: tl.constexpr, PER_CLASS: tl.constexpr,
    HARD: tl.constexpr, SMOOTHED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    V: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A tile of R rows and C classes of the gradients."""
    tile = tl.program_id(0).to(tl.int64)
    row = (tile // blocks) * R + tl.arange(0, R)
    k = (tile % blocks).to(tl.int32) * C + tl.arange(0, C)
    weight = weight_of(row_weight, weight_stride, row, rows, F)
    used = weight != 0.0
    mask = used[:, None] & (k < aligned(classes, V))[None, :]
    s = load_tile(student, student_layout, row, k, mask, F, V)
    t = load_tile(teacher, teacher_layout, row, k, mask, F, V)
    factor = grad_scale(divisor, divisor_tensor, F) * weight * number(scale, F)
    factor *= grad_loss_of(grad_loss, grad_loss_stride, row, rows, F)
    hard = None
    if HARD != "":
        column, counts_hard = target_of(target, target_stride, ignore_index, row, rows, classes, used)
        top, hard_inv_z, hard_slope = load_hard_stats(row_stats, row * STATS + (STATS - HARD_STATS), used)
        hard_factor = weight * grad_scale(hard_divisor, hard_divisor_tensor, F)
        hard_factor *= grad_loss_of(grad_loss, grad_loss_stride, row, rows, F)
        e = exponentials(s, top)
        hard = hard_gradient(e, k, column, counts_hard, hard_inv_z, hard_slope, hard_factor, smoothing, classes, F)
    if row_stats is not None:
        at = row_stats + row * STATS
        s -= tl.load(at, mask=used, other=0.0)[:, None]
        t -= tl.load(at + 1, mask=used, other=0.0)[:, None]
        d, counts = _differences(s, t)
        slope = _slope(d - tl.load(at + 2, mask=used, other=0.0)[:, None], delta, F, KIND)
        if KIND != "square":
            slope -= tl.load(at + 4, mask=used, other=0.0)[:, None]
        slope = tl.where(counts, slope, 0.0)
        if PER_CLASS:
            factor *= tl.load(at + 3, mask=used, other=0.0)
    else:
        d, _counts = _differences(s, t)
        slope = _slope(d, delta, F, KIND)
    g = slope * tl.where(used, factor, 0.0)[:, None]
    _store_gradients(
        g, hard, row, k, rows, classes, grad_student, student_grad_layout, student_width, grad_teacher, teacher_grad_layout, teacher_width,
        HARD, V, PADDED,
    )  # fmt: skip


# ---- on the host -----------------------------------------------------------------------------------------------------------------


class LogitDifference(Call):
    """What is summed is a function of the differences: KIND, above."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        options: Any,
        kind: str,
        center: bool,
        per_class: bool,
        scale: float,
        delta: float = 1.0,
        hard: HardPart | None = None,
    ) -> None:
        super().__init__(student, teacher, *options)
        self.hard = hard
        if hard is not None:
            self.stats = STATS + HARD_STATS.value
        elif center:
            self.stats = STATS if kind == "square" else STATS + 1
        self.per_row = 1 if per_class else self.classes
        self.parameters = scale, delta
        self.constants["KIND"] = kind
        self.of_rows = {"STATS": self.stats, "CENTER": center, "PER_CLASS": per_class, **self.hard_constants()}
        self.exact = student.element_size() == 2 and teacher.element_size() == 2

    def launch_forward(
        self,
        loss: Tensor | None,
        row_stats: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
        divisor: Divisor,
    ) -> Tensor:
        per_row, gradients = loss is not None, (grad_student, grad_teacher)
        tiles, resident = forward_tiles(self.classes, self.dtype.itemsize, self.stats > 0, grad_student is not None)
        if self.stats == 0:
            tile = self.tile(tiles, LogitDifference.launch_rows, (per_row, divisor), True, *gradients)
            loss = self.empty((triton.cdiv(self.rows, tile.rows),)) if loss is None else loss
            self.launch_rows(tile, per_row, divisor, loss, *gradients)
            return loss
        if self.forgetful:
            row_stats = None
        at_once = gradients if resident or self.row_bytes <= IN_L2 else (None, None)
        if row_stats is None and grad_student is not at_once[0]:
            row_stats = self.empty((self.rows, self.stats))
        given = per_row, resident, None, divisor
        tile = self.tile(tiles, LogitDifference.launch_row, given, True, row_stats, *at_once)
        loss = self.empty((triton.cdiv(self.rows, tile.rows),)) if loss is None else loss
        self.launch_row(tile, *given, loss, row_stats, *at_once)
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
            tiles, resident = forward_tiles(self.classes, self.dtype.itemsize, True, True)
            rest = False, resident, grad_loss, divisor
            tile = self.tile(tiles, LogitDifference.launch_row, rest, None, None, grad_student, grad_teacher)
            self.launch_row(tile, *rest, None, None, grad_student, grad_teacher)
            return
        given = row_stats if self.stats else None, grad_loss, divisor
        tiles = tiles_of_gradients(max(g.shape[-1] for g in (grad_student, grad_teacher) if g is not None), self.dtype.itemsize)
        tile = self.tile(tiles, LogitDifference.launch_tiles, given, grad_student, grad_teacher)
        self.launch_tiles(tile, *given, grad_student, grad_teacher)

    def launch_rows(
        self,
        tile: Tile,
        per_row: bool,
        divisor: Divisor,
        loss: Tensor,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
    ) -> None:
        rows_kernel[(triton.cdiv(self.rows, tile.rows),)](
            *self.inputs, *self.parameters, *divisor, loss, *gradient_args(grad_student), *gradient_args(grad_teacher),
            **self.constants, PER_ROW=per_row, R=tile.rows, C=tile.classes, num_warps=tile.warps,
        )  # fmt: skip

    def launch_row(
        self,
        tile: Tile,
        per_row: bool,
        resident: bool,
        grad_loss: Tensor | None,
        divisor: Divisor,
        loss: Tensor | None,
        row_stats: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
    ) -> None:
        row_kernel[(triton.cdiv(self.rows, tile.rows),)](
            *self.inputs, *self.parameters, *divisor, *self.hard_args(grad_student is not None or grad_teacher is not None, loss),
            loss, row_stats, grad_loss, 0 if grad_loss is None or one_number(grad_loss) else 1,
            *gradient_args(grad_student), *gradient_args(grad_teacher),
            **self.constants, **self.of_rows, PER_ROW=per_row, R=tile.rows, C=tile.classes, EXACT=self.exact, RESIDENT=resident,
            num_warps=tile.warps,
        )  # fmt: skip

    def launch_tiles(
        self,
        tile: Tile,
        row_stats: Tensor | None,
        grad_loss: Tensor | None,
        divisor: Divisor,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
    ) -> None:
        width = max(g.shape[-1] for g in (grad_student, grad_teacher) if g is not None)
        blocks = triton.cdiv(width, tile.classes)
        gradient_kernel[(triton.cdiv(self.rows, tile.rows) * blocks,)](
            *self.inputs, *self.parameters, *divisor, *self.hard_args(True, None), row_stats,
            grad_loss, 0 if grad_loss is None or one_number(grad_loss) else 1,
            *gradient_args(grad_student), *gradient_args(grad_teacher), blocks,
            **self.constants, **self.of_rows, R=tile.rows, C=tile.classes, num_warps=tile.warps,
        )  # fmt: skip


def forward_tiles(classes: int, itemsize: int, with_row: bool, with_gradient: bool) -> tuple[tuple[Tile, ...], bool]:
    """Tiles, and whether a row lies in one. with_row: something is needed of it as a whole."""
    c = max(16, triton.next_power_of_2(classes))
    double = itemsize == 8
    largest = 2048 if not with_row else 4096 if double or not with_gradient else 16384
    resident = c <= largest
    if not resident:
        c = 2048
    if c <= 1024:
        return tiles_of_rows(c, itemsize), True
    warps = max(4, min(16, c // (256 if double else 512)))
    first = Tile(1, c, warps)
    return (first,) if double or warps == 16 else (first, Tile(1, c, 2 * warps)), resident


class LogitMse(LogitDifference):
    def __init__(self, student: Tensor, teacher: Tensor, *rest: Any, hard: HardPart | None = None) -> None:
        *options, center, tau_limit = rest
        super().__init__(student, teacher, options, "square", center, tau_limit, 0.5 if tau_limit else 1.0, hard=hard)


OPERATORS = operators(LogitMse)
