"""What the losses' launches share: where rows lie, the divisor of a reduction, the sum over rows, a gradient times a number.

A step launches these kernels and a loss's own alone: no operator of torch runs on the device.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.triton.autotune import Tile, choose, rows_to_measure
from kdfast.triton.kl_math import number

# Bytes of a row of both logits, of which two for each of 132 multiprocessors fit the 50 MiB L2 cache of an H100.
IN_L2 = 1 << 17

MAX_ROW_DIMS = 6  # leading dimensions that do not merge, as in csrc/kernels.h; logits of more are copied
SUM_BLOCK = 1024  # rows that a program adds up, or mixes, at a time


# ---- in kernels ------------------------------------------------------------------------------------------------------------------


@triton.jit
def aligned(x, V: tl.constexpr):
    """x, a multiple of V: said so that the compiler knows it, which sees multiples of 16 by itself."""
    return x // V * V


@triton.jit
def row_offsets(row, layout, V: tl.constexpr):
    """Where rows start. layout: the sizes of the leading dimensions but the outermost, then the strides of all."""
    dims: tl.constexpr = (len(layout) + 1) // 2
    at = tl.zeros_like(row)
    for d in tl.static_range(dims - 1, 0, -1):
        outer = row // layout[d - 1]
        at += (row - outer * layout[d - 1]) * aligned(layout[dims - 1 + d], V)
        row = outer
    return at + row * aligned(layout[dims - 1], V)


@triton.jit
def grad_scale(divisor, divisor_tensor, F: tl.constexpr):
    """1 / divisor, times a tensor's where there is one."""
    if divisor_tensor is None:
        return number(1.0 / divisor, F)
    else:
        return number(1.0 / divisor, F) / tl.load(divisor_tensor).to(F)


@triton.jit
def weight_of(weight, weight_stride, row, rows, F: tl.constexpr):
    """One for each row there is where no weights are given; 0 beyond the last."""
    if weight is None:
        return tl.where(row < rows, 1.0, 0.0).to(F)
    else:
        return tl.load(weight + row * weight_stride, mask=row < rows, other=0).to(F)


@triton.jit
def load_tile(logits, layout, row, k, mask, F: tl.constexpr, V: tl.constexpr):
    return tl.load(logits + row_offsets(row, layout, V)[:, None] + k[None, :], mask=mask, other=-float("inf")).to(F)


@triton.jit
def grad_loss_of(grad_loss, grad_loss_stride, row, rows, F: tl.constexpr):
    """A loss's incoming gradient; 1 where there is none."""
    if grad_loss is None:
        return tl.full([], 1.0, F)
    else:
        return tl.load(grad_loss + row * grad_loss_stride, mask=row < rows, other=0.0).to(F)


@triton.jit
def store_loss(loss, row, rows, value, PER_ROW: tl.constexpr):
    """A row's value, or the sum of those of a program's rows."""
    if PER_ROW:
        tl.store(loss + row, value, mask=row < rows)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(value, 0))


@triton.jit
def store_gradient(gradient, layout, width, row, k, rows, classes, g, V: tl.constexpr, PADDED: tl.constexpr):
    """A tile of a gradient; PADDED: with zeros in the columns from `classes` on, where a row with NaN has NaN too."""
    if PADDED:
        g = tl.where((k < classes)[None, :], g, 0.0)
    at = gradient + row_offsets(row, layout, V)[:, None] + k[None, :]
    tl.store(at, g.to(gradient.dtype.element_ty), mask=(row < rows)[:, None] & (k < aligned(width, V))[None, :])


@triton.jit
def divisor_kernel(weight, rows, target, target_stride, ignore_index, per_row: "fp64", out, BLOCK: tl.constexpr):
    """The divisor of a mean over rows that have weights, or targets; 1 where every row is masked."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        w = weight_of(weight, 1, start + at, rows, tl.float64)
        if target is not None:
            y = tl.load(target + (start + at) * target_stride, mask=start + at < rows, other=0).to(tl.int64)
            w = tl.where(y == ignore_index, 0.0, w)
        total += w
    total = tl.sum(total, 0)
    tl.store(out, tl.where(total == 0.0, 1.0, total * per_row))


@triton.jit
def _reduced(partial, count, divisor, divisor_tensor, BLOCK: tl.constexpr):
    """The sum of partial sums, in their order, over the divisor; in float64."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(partial + start + at, mask=start + at < count, other=0.0).to(tl.float64)
    total = tl.sum(total, 0)
    if divisor_tensor is None:
        return total / number(divisor, tl.float64)
    else:
        return total / tl.load(divisor_tensor).to(tl.float64)


@triton.jit
def _mixed(hard, soft, alpha):
    """(1 - alpha) * hard + alpha * soft; one of them, whatever the other holds, at 0 and 1."""
    mixed = number(1.0 - alpha, hard.dtype) * hard + number(alpha, hard.dtype) * soft
    return tl.where(alpha == 0.0, hard, tl.where(alpha == 1.0, soft, mixed))


@triton.jit
def reduce_kernel(partial, count, divisor: "fp64", divisor_tensor, out, BLOCK: tl.constexpr):
    tl.store(out, _reduced(partial, count, divisor, divisor_tensor, BLOCK).to(out.dtype.element_ty))


@triton.jit
def reduce_parts_kernel(
    partial, count, divisor: "fp64", divisor_tensor, out,
    hard_partial, hard_divisor: "fp64", hard_divisor_tensor, hard_out, alpha: "fp64", mixed_out, BLOCK: tl.constexpr,
):  # fmt: skip
    """reduce_kernel for the soft and the hard part, and their mixture."""
    soft = _reduced(partial, count, divisor, divisor_tensor, BLOCK)
    hard = _reduced(hard_partial, count, hard_divisor, hard_divisor_tensor, BLOCK)
    tl.store(out, soft.to(out.dtype.element_ty))
    tl.store(hard_out, hard.to(out.dtype.element_ty))
    tl.store(mixed_out, _mixed(hard, soft, alpha).to(out.dtype.element_ty))


@triton.jit
def mix_kernel(hard, soft, count, alpha: "fp64", out, BLOCK: tl.constexpr):
    """The mixture of each row's parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(hard + at, mask=at < count, other=0.0)
    s = tl.load(soft + at, mask=at < count, other=0.0)
    tl.store(out + at, _mixed(h, s, alpha), mask=at < count)


@triton.jit
def scale_kernel(out, gradient, factor, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    if out.dtype.element_ty == tl.float64:
        f = tl.load(factor).to(tl.float64)
    else:
        f = tl.load(factor).to(tl.float32)
    if not IN_PLACE or f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(gradient + at, mask=at < size)
        tl.store(out + at, (g.to(f.dtype) * f).to(out.dtype.element_ty), mask=at < size)


# ---- on the host -----------------------------------------------------------------------------------------------------------------


# Tiles, a list for autotune.choose: the first is taken where nothing is measured. Classes a thread are registers a thread: more of them
# hide a load's latency within a warp, fewer leave room for more warps, and for barriers where these share a row. A program has 16 warps
# at most: of 64 threads, as AMD's GPUs have them, more are not launched.


def tiles_of_rows(c: int, itemsize: int) -> tuple[Tile, ...]:
    """For whole rows of up to c classes."""
    double = itemsize == 8
    if c <= 512:
        together = 1024 if c == 16 and not double else 512
        first = Tile(together // c, c, 2)
        return (first,) if double else (first, Tile(1024 // c, c, 4), Tile(2048 // c, c, 4))
    first = Tile(1, c, c // (256 if double else 1024))  # a row of 1k in one warp needs no barriers
    return (first,) if double or c > 8192 else (first, Tile(1, c, 2 * first.warps))


def tiles_of_gradients(width: int, itemsize: int) -> tuple[Tile, ...]:
    """Where nothing is shared but a row's statistics."""
    a_warp = 256 if itemsize == 8 else 512
    c = min(4 * a_warp, max(16, triton.next_power_of_2(width)))
    if c <= 512:
        return tiles_of_rows(c, itemsize)
    first = Tile(1, c, c // a_warp)
    return (first,) if itemsize == 8 else (first, Tile(1, c, 2 * first.warps))


def merged_rows(logits: Tensor) -> tuple[int, ...] | None:
    """The layout of row_offsets; None where the leading dimensions do not merge into few enough."""
    dims: list[list[int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = [dims[-1][0] * size, stride]
        else:
            dims.append([size, stride])
    if len(dims) > MAX_ROW_DIMS:
        return None
    dims = dims or [[1, logits.shape[-1]]]  # one row
    return (*(size for size, _ in dims[1:]), *(stride for _, stride in dims))


def rows_of(logits: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    layout = merged_rows(logits)
    if layout is None:
        logits = logits.contiguous()
        layout = (logits.shape[-1],)
    return logits, layout


def gradient_args(gradient: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], int]:
    """(tensor, layout, width), of a gradient that may not be wanted."""
    if gradient is None:
        return None, (1,), 0
    layout = merged_rows(gradient)
    if layout is None:
        raise ValueError(
            f"inplace_backward with backend 'triton' takes student_logits of at most {MAX_ROW_DIMS} leading dimensions that do not "
            f"merge; got shape {tuple(gradient.shape)} and strides {gradient.stride()}"
        )
    return gradient, layout, gradient.shape[-1]


def multiple(*numbers_or_layouts: int | tuple[int, ...]) -> int:
    """The largest power of two, up to 16, that divides numbers and the strides of layouts."""
    divisor = 16
    for x in numbers_or_layouts:
        divisor = math.gcd(divisor, *(x[len(x) // 2 :] if isinstance(x, tuple) else (x,)))
    return divisor


def one_number(tensor: Tensor) -> bool:
    """Whether it holds one number for all rows."""
    return tensor.numel() == 1 or not any(tensor.stride())


def accumulate_type(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def on_device(tensor: Tensor) -> Any:
    """Makes a tensor's device the current one, which is where Triton launches."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


# The number that the sum over rows is divided by: a float, times a tensor where the device alone knows it.
Divisor = tuple[float, Tensor | None]


class HardPart(NamedTuple):
    """What kd_loss has beside its soft part."""

    target: Tensor
    alpha: float
    ignore_index: int
    label_smoothing: float


class Call:
    """One call of a loss's operators. A subclass has its parameters, and launches its kernels."""

    stats = 0  # numbers a row that the backward needs
    per_row = 1  # how many elements a row counts for in a mean
    hard: HardPart | None = None
    hard_loss: Tensor | None = None  # beside what launch_forward returns

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        row_weight: Tensor | None,
        denominator: Tensor | None,
        divisor: float | None,
        reduction: int,
        num_classes: int,
    ) -> None:
        self.reduction = reduction
        self.shape = student.shape[:-1]
        self.rows = self.shape.numel()
        self.classes = student.shape[-1] if num_classes < 0 else num_classes
        self.dtype = accumulate_type(student, teacher)
        self.dtypes = student.dtype, teacher.dtype
        self.row_bytes = self.classes * (student.element_size() + teacher.element_size())
        self.device = student.device
        self.row_weight, self.denominator, self.number = row_weight, denominator, divisor
        # the first arguments of every kernel
        stride = 0 if row_weight is None or one_number(row_weight) else 1
        self.inputs = (*rows_of(student), *rows_of(teacher), row_weight, stride, self.rows, self.classes)
        widths = student.shape[-1], teacher.shape[-1]
        self.of_rows: dict[str, Any] = {}  # and the last of kernels that need something of a whole row
        # and the last: V divides the start of every row and its length
        self.constants: dict[str, Any] = {
            "F": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "V": multiple(*widths, self.classes, self.inputs[1], self.inputs[3]),
            "PADDED": self.classes < max(widths),
        }

    @property
    def forgetful(self) -> bool:
        """Whether the statistics would be more than a fortieth of the logits: a row's backward computes them again."""
        return self.row_bytes < 40 * self.stats * self.dtype.itemsize

    # Each launches kernels over all rows.
    def launch_forward(
        self,
        loss: Tensor | None,
        row_stats: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
        divisor: Divisor,
    ) -> Tensor:
        """Fills loss, one value a row; or, where it is None, returns partial sums. Fills the others that are not None."""
        raise NotImplementedError

    def launch_gradients(
        self,
        row_stats: Tensor,
        grad_loss: Tensor | None,
        grad_student: Tensor | None,
        grad_teacher: Tensor | None,
        divisor: Divisor,
    ) -> None:
        """Fills the gradients that are not None."""
        raise NotImplementedError

    def tile(
        self, tiles: tuple[Tile, ...], launch: Callable[..., Any], given: tuple[Any, ...], *outputs: Tensor | bool | None
    ) -> Tile:
        """The one that launch(self, tile, *given, *outputs) is to take, which starts one kernel. outputs: what it fills, tensors whose
        last dimension is a row, True for one number a row, None for nothing."""
        rows = rows_to_measure(self.rows, self.classes)
        if rows == 0:
            return tiles[0]

        def trial() -> Callable[[Tile], Any]:
            few = copy.copy(self)
            few.rows, few.inputs = rows, (*self.inputs[:-2], rows, self.classes)
            scratch = [
                None if x is None else few.empty((rows,)) if x is True else few.empty((rows, x.shape[-1]), x.dtype)
                for x in outputs
            ]
            return lambda tile: launch(few, tile, *given, *scratch)

        kind = launch, triton.next_power_of_2(self.classes), *self.dtypes, self.device, tiles, tuple(x is None for x in outputs)
        return choose((*kind, *self.constants.values(), *self.of_rows.values()), tiles, trial)

    def empty(self, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def hard_args(self, for_gradient: bool, loss: Tensor | None) -> tuple[Any, ...]:
        """A kernel's arguments of the hard part. loss: the soft part's, which gets a hard_loss beside it."""
        if self.hard is None:
            return None, 0, 0, 0.0, 1.0, None, None
        target, alpha, ignore_index, smoothing = self.hard
        divisor = _over(1 - alpha, self.hard_divisor) if for_gradient else (1.0, None)
        hard_loss = None
        if loss is not None:
            hard_loss = self.hard_loss = self.empty(loss.shape)
        return target, 0 if one_number(target) else 1, ignore_index, smoothing, *divisor, hard_loss

    def hard_constants(self) -> dict[str, Any]:
        if self.hard is None:
            return {"HARD": "", "SMOOTHED": False}
        parts = {0.0: "alone", 1.0: "value"}.get(self.hard.alpha, "both")
        return {"HARD": parts, "SMOOTHED": self.hard.label_smoothing != 0}

    def for_gradient(self, divisor: Divisor) -> Divisor:
        """The divisor of the gradient of what launch_forward computes."""
        return divisor if self.hard is None else _over(self.hard.alpha, divisor)

    def values(self, loss: Tensor, divisor: Divisor | None) -> tuple[Tensor, ...]:
        """What the operators return of what launch_forward returned; divisor: None for one value a row."""
        count = loss.numel()
        if self.hard is None:
            if divisor is None:
                return (loss,)
            out = self.empty(())
            reduce_kernel[(1,)](loss, count, *divisor, out, BLOCK=SUM_BLOCK)
            return (out,)
        hard_loss = self.empty(loss.shape) if self.hard_loss is None else self.hard_loss  # there are no rows
        if divisor is None:
            mixed = self.empty(loss.shape)
            if count > 0:
                mix_kernel[(triton.cdiv(count, SUM_BLOCK),)](hard_loss, loss, count, self.hard.alpha, mixed, BLOCK=SUM_BLOCK)
            return mixed, hard_loss, loss
        mixed, hard, soft = self.empty(()), self.empty(()), self.empty(())
        reduce_parts_kernel[(1,)](
            loss, count, *divisor, soft, hard_loss, *self.hard_divisor, hard, self.hard.alpha, mixed, BLOCK=SUM_BLOCK
        )
        return mixed, hard, soft

    @functools.cached_property
    def hard_divisor(self) -> Divisor:
        return self.divisor(hard=True)

    def divisor(self, hard: bool = False) -> Divisor:
        """Of the soft part, or of a loss that has no other, or of the hard part."""
        if self.number is not None:
            return self.number, None
        if self.denominator is not None:
            return 1.0, self.denominator
        if self.reduction == 3:
            return float(self.shape[0]), None
        if self.reduction != 2:
            return 1.0, None
        per_row = 1 if hard else self.per_row
        counted = self.hard if hard else None
        if self.rows == 0 or (self.row_weight is None and counted is None):
            return float(self.rows * per_row), None
        target, stride, ignore_index = None, 0, 0
        if counted is not None:
            target, stride, ignore_index = counted.target, 0 if one_number(counted.target) else 1, counted.ignore_index
        out = self.empty((), torch.float64)
        divisor_kernel[(1,)](self.row_weight, self.rows, target, stride, ignore_index, float(per_row), out, BLOCK=SUM_BLOCK)
        return 1.0, out


def _over(factor: float, divisor: Divisor) -> Divisor:
    """The divisor of something that a factor multiplies; where that is 0, nothing is divided by it."""
    return divisor[0] / (factor or 1.0), divisor[1]


def operators(loss: Callable[..., Call]) -> dict[str, Callable[..., Any]]:
    """A loss's operators, as csrc/ops.cpp declares them."""

    def forward(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *rest, for_backward = rest
        call = loss(student, teacher, *rest)
        row_stats = call.empty((call.rows, call.stats if for_backward else 0))
        per_row = call.empty(call.shape) if call.reduction == 0 else None
        with on_device(student):
            value = call.empty((0,)) if per_row is None else per_row
            if call.rows > 0:
                value = call.launch_forward(per_row, row_stats if row_stats.shape[1] else None, None, None, (1.0, None))
            return *call.values(value, None if per_row is not None else call.divisor()), row_stats

    def with_gradients(grad_student: Tensor, grad_teacher: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
        call = loss(*inputs)
        with on_device(grad_student):
            divisor, partial = call.divisor(), call.empty((0,))
            if call.rows > 0:
                partial = call.launch_forward(None, None, grad_student, grad_teacher, call.for_gradient(divisor))
            return call.values(partial, divisor)

    def forward_grad(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        gradient = new_gradient(student)
        return *with_gradients(gradient, None, student, teacher, *rest), gradient

    def forward_grads(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        gradients = new_gradient(student), new_gradient(teacher)
        return *with_gradients(*gradients, student, teacher, *rest), *gradients

    def into(
        grad_student: Tensor | None, grad_teacher: Tensor | None, grad_loss: Tensor, student: Tensor, teacher: Tensor, row_stats: Tensor,
        *rest: Any,
    ) -> None:  # fmt: skip
        call = loss(student, teacher, *rest)
        if call.rows > 0 and (grad_student is not None or grad_teacher is not None):
            with on_device(student):
                call.launch_gradients(row_stats, grad_loss, grad_student, grad_teacher, call.for_gradient(call.divisor()))

    def backward(grad_loss: Tensor, student: Tensor, teacher: Tensor, row_stats: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *rest, for_student, for_teacher = rest
        grad_student, grad_teacher = new_gradient(student, for_student), new_gradient(teacher, for_teacher)
        wanted = grad_student if for_student else None, grad_teacher if for_teacher else None
        into(*wanted, grad_loss, student, teacher, row_stats, *rest)
        return grad_student, grad_teacher

    def backward_inplace(grad_loss: Tensor, student: Tensor, teacher: Tensor, row_stats: Tensor, *rest: Any) -> Tensor:
        *rest, for_teacher = rest
        grad_teacher = new_gradient(teacher, for_teacher)
        into(student, grad_teacher if for_teacher else None, grad_loss, student, teacher, row_stats, *rest)
        return grad_teacher

    return {f.__name__: f for f in (forward, forward_grad, forward_grads, backward, backward_inplace)}


def new_gradient(like: Tensor, wanted: bool = True) -> Tensor:
    """Contiguous; an empty tensor where it is not wanted."""
    return torch.empty(like.shape if wanted else (0,), dtype=like.dtype, device=like.device)


def scale_gradient(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    out = new_gradient(gradient)
    _scale(out, gradient, grad_loss)
    return out


def scale_gradient_inplace(gradient: Tensor, grad_loss: Tensor) -> None:
    _scale(gradient, gradient, grad_loss)


def _scale(out: Tensor, gradient: Tensor, grad_loss: Tensor) -> None:
    size = gradient.numel()
    if size == 0:
        return
    block = 4096 // gradient.element_size() * 2
    with on_device(gradient):
        scale_kernel[(math.ceil(size / block),)](
            out, gradient, grad_loss, size, IN_PLACE=out is gradient, BLOCK=block, num_warps=4
        )
