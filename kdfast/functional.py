"""The losses. Each takes raw logits of shape (..., K), checks every argument before anything is computed, and chooses a backend."""

import functools
import math
import numbers
import os
import re
import warnings
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from kdfast import _ops
from kdfast._load import HAS_TRITON

Number = float | int

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}  # as csrc/kernels.h numbers them
SOFT = ("kl", "mse")
HUBER_KINDS = ("pseudo", "smooth_l1")
BACKENDS = ("auto", "cpp", "triton", "reference")
STRIDED = torch.strided
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DENOMINATOR_DTYPES = (*LOGIT_DTYPES, torch.int64, torch.int32)

SMALLEST_TAU, LARGEST_TAU = 1e-15, 1e15  # beyond, tau**2 soon leaves float32
# What a parameter may be, in words. Here, since a call should not format what only an error shows.
TAU_TAKEN = f"a number from {SMALLEST_TAU:g} to {LARGEST_TAU:g} or math.inf"
SMALLEST_DELTA, LARGEST_DELTA = 1e-15, 1e15
DELTA_TAKEN = f"a number from {SMALLEST_DELTA:g} to {LARGEST_DELTA:g}"
SMALLEST_DENOMINATOR, LARGEST_DENOMINATOR = 1e-30, 1e30  # so that 1 / denominator is a float32 too
DENOMINATOR_TAKEN = f"a number from {SMALLEST_DENOMINATOR:g} to {LARGEST_DENOMINATOR:g} or a 0-d tensor"
# From here on a float32 computation takes the limit itself: the loss differs from it by less than |s - t| / tau, and tau**2 nears
# the end of the exponent range.
LIMIT_TAU = 1e10


def kl_div_tau(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tau: Number = 1.0,
    *,
    teacher_tau: Number | None = None,
    scale_by_tau_squared: bool = True,
    reduction: str = "batchmean",
    row_weight: Tensor | None = None,
    denominator: Number | Tensor | None = None,
    num_classes: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax-KL divergence at temperature tau, the distillation loss of Hinton et al. (2015).

    For each row: ``tau**2 * KL(softmax(teacher / tau) || softmax(student / tau))``, within 5e-6 of the exact value, relative, and
    its gradient within 2e-6, at every tau from 0.05 to 1e6 and at infinity; README.md lists the exceptions under "Limits". (Kim et
    al., IJCAI 2021: the loss tends to logit matching as tau grows, to label matching as it shrinks.)

    Args:
        student_logits: (..., K), at least one leading dimension; float64, float32, bfloat16 or float16. Leading dimensions may be
            strided; a class dimension of another stride than 1 is copied, once.
        teacher_logits: (..., K), the same leading dimensions and device, any of these dtypes. Its gradient is computed if required.
        tau: temperature, a number from 1e-15 to 1e15. ``math.inf`` is the exact limit: half the variance over the classes of
            student - teacher.
        teacher_tau: the teacher's own temperature; None: tau.
        scale_by_tau_squared: multiply by tau**2, which keeps gradients of one size over tau.
        reduction: "none": one value a row, shape (...). "sum". "mean": over rows, weighted by row_weight where given.
            "batchmean": the sum divided by student_logits.size(0), as torch.nn.KLDivLoss defines it, whatever the weights.
            Of no rows at all, "sum" is 0 and the means are NaN, as torch's ("batchmean" where size(0) is 0).
        row_weight: (...), bool mask or floating weights, not negative, of float32's normal range. A row of weight 0 contributes
            nothing, whatever it holds, and gets a zero gradient. All rows masked: the loss is 0.
        denominator: a number from 1e-30 to 1e30, or a 0-d tensor on the logits' device, that replaces the divisor of a scalar reduction.
            (Under torch.compile a tensor: it compiles anew for another number.)
        num_classes: use the first num_classes columns only (a padded vocabulary); the others get a zero gradient.
        inplace_backward: the backward pass overwrites student_logits with its gradient: no memory beyond O(rows). Taken for
            non-leaf logits only (or such as require no grad), of a class dimension of stride 1, whose rows overlap neither each
            other nor the teacher's; whoever else needs them gets autograd's error about an in-place change. Pass the logits
            themselves: a slice's own backward pass allocates a gradient of all of them. Without effect under torch.compile and
            under hooks on saved tensors (save_on_cpu, checkpoints), which look at no version counters.
        backend: "auto", "cpp" (C++ on the CPU, CUDA C++ on a GPU), "triton" or "reference" (plain torch). The environment variable
            KDFAST_BACKEND, read at import, replaces "auto".

    Returns:
        The loss, float32 (float64 where either input is), 0-d or of shape (...). Classes at -inf are legal: in the teacher they
        contribute 0, on both sides 0 with a zero gradient, in the student alone the loss is +inf. NaN stays in its row.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is taken.
    """
    tau = _temperature("tau", tau)
    teacher_tau = tau if teacher_tau is None else _temperature("teacher_tau", teacher_tau)
    _check_flag("scale_by_tau_squared", scale_by_tau_squared)
    if math.inf in (tau, teacher_tau):
        if teacher_tau != tau:
            raise ValueError(
                f"teacher_tau must equal tau where either is infinite; got tau={tau} and teacher_tau={teacher_tau}"
            )
        if not scale_by_tau_squared:
            raise ValueError("scale_by_tau_squared must be true at tau=inf: without the factor the limit is identically 0")
    loss = _ops.KL_DIV_TAU
    parameters: _ops.Parameters = (tau, teacher_tau, scale_by_tau_squared)
    if tau >= LIMIT_TAU and teacher_tau == tau and scale_by_tau_squared:
        _check_logits(student_logits, teacher_logits)
        if _at_the_limit(tau, student_logits, teacher_logits):
            loss, parameters = _ops.LOGIT_MSE, (True, True)
    return _call(
        loss,
        parameters,
        student_logits,
        teacher_logits,
        reduction,
        row_weight,
        denominator,
        num_classes,
        inplace_backward,
        backend,
    )[0]


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    center: bool = False,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    denominator: Number | Tensor | None = None,
    num_classes: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Squared difference of the logits: direct logit matching (Ba & Caruana, 2014; Kim et al., IJCAI 2021).

    For each row: the sum over classes of ``(student - teacher)**2``. With the default reduction it equals
    ``torch.nn.functional.mse_loss``. Arguments, result and errors are those of :func:`kl_div_tau`, but for:

    Args:
        center: remove each row's mean difference first. 0.5 / K times a row's centred sum is the limit of kl_div_tau as tau grows.
        reduction: "mean" divides by rows * K (by K times the sum of row_weight, where given); "none" and the others as for kl_div_tau.
            A denominator replaces the whole divisor, K included.

    A class at -inf on both sides contributes nothing, and does not count in the mean difference; on one side alone the loss is +inf.
    """
    _check_flag("center", center)
    return _call(
        _ops.LOGIT_MSE,
        (center, False),
        student_logits,
        teacher_logits,
        reduction,
        row_weight,
        denominator,
        num_classes,
        inplace_backward,
        backend,
    )[0]


def logit_huber(
    student_logits: Tensor,
    teacher_logits: Tensor,
    delta: Number = 1.0,
    *,
    kind: str = "pseudo",
    center: bool = False,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    denominator: Number | Tensor | None = None,
    num_classes: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Robust difference of the logits: squared where student and teacher are near, linear where they are far apart.

    For each row: the sum over classes of a function of ``d = student - teacher``. Arguments, result and errors are those of
    :func:`logit_mse`, but for:

    Args:
        delta: where the square ends and the line begins, a number from 1e-15 to 1e15.
        kind: "pseudo": the pseudo-Huber loss ``delta**2 * (sqrt(1 + (d / delta)**2) - 1)``, smooth in every derivative; near 0 it is
            ``d**2 / 2``, far out ``delta * |d|``. "smooth_l1": as ``torch.nn.functional.smooth_l1_loss(beta=delta)``,
            ``d**2 / (2 * delta)`` where ``|d| < delta``, else ``|d| - delta / 2``. (``huber_loss`` is delta times that.)
        center: remove each row's mean difference first: the mean, not a robust location.
        reduction: as for logit_mse; "mean", the default, divides by rows * K.
    """
    delta = _number("delta", delta, DELTA_TAKEN, lambda x: SMALLEST_DELTA <= x <= LARGEST_DELTA)
    _check_choice("kind", kind, HUBER_KINDS)
    _check_flag("center", center)
    return _call(
        _ops.LOGIT_HUBER,
        (delta, kind == "smooth_l1", center),
        student_logits,
        teacher_logits,
        reduction,
        row_weight,
        denominator,
        num_classes,
        inplace_backward,
        backend,
    )[0]


class KDParts(NamedTuple):
    """What :func:`kd_loss` returns with ``return_parts=True``."""

    loss: Tensor
    hard: Tensor
    soft: Tensor


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    tau: Number = 4.0,
    alpha: Number = 0.9,
    soft: str = "kl",
    ignore_index: int = -100,
    label_smoothing: Number = 0.0,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    denominator: Number | Tensor | None = None,
    num_classes: int | None = None,
    return_parts: Literal[False] = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    tau: Number = 4.0,
    alpha: Number = 0.9,
    soft: str = "kl",
    ignore_index: int = -100,
    label_smoothing: Number = 0.0,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    denominator: Number | Tensor | None = None,
    num_classes: int | None = None,
    return_parts: Literal[True],
    inplace_backward: bool = False,
    backend: str = "auto",
) -> KDParts: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    tau: Number = 4.0,
    alpha: Number = 0.9,
    soft: str = "kl",
    ignore_index: int = -100,
    label_smoothing: Number = 0.0,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    denominator: Number | Tensor | None = None,
    num_classes: int | None = None,
    return_parts: bool,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | KDParts: ...


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    tau: Number = 4.0,
    alpha: Number = 0.9,
    soft: str = "kl",
    ignore_index: int = -100,
    label_smoothing: Number = 0.0,
    reduction: str = "mean",
    row_weight: Tensor | None = None,
    denominator: Number | Tensor | None = None,
    num_classes: int | None = None,
    return_parts: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | KDParts:
    r"""The whole objective of distillation: ``(1 - alpha) * cross_entropy(student, target) + alpha * soft``, in one pass.

    The soft part is :func:`kl_div_tau` at temperature tau, with its factor ``tau**2``, or :func:`logit_mse`; the hard part is
    ``torch.nn.functional.cross_entropy`` at temperature 1. Logits, result and errors are those of kl_div_tau (float64 on one side
    alone is made so on the other, by a copy), but for:

    Args:
        target: (...), int64 or int32: each row's class. One that is no class is a ValueError on the CPU (in compiled
            code a RuntimeError); elsewhere, and in transforms of torch.func, its row becomes NaN. Not looked at in rows of weight 0.
        tau: the soft part's temperature, student's and teacher's; math.inf is the limit. Without effect on soft="mse".
        alpha: weight of the soft part, a number from 0 to 1. At 0 and at 1 the other part does not enter loss or gradient,
            whatever it holds: a teacher of NaN changes nothing at alpha = 0.
        soft: "kl" or "mse".
        ignore_index: a row with this target has no hard part. (To remove the row from both parts, give it the weight 0.)
        label_smoothing: from 0 to 1, as torch.nn.CrossEntropyLoss defines it, over the num_classes used.
        reduction: of each part by itself, before they are mixed. "mean": the hard part's over the rows that are not ignored, the
            soft part's over all rows (soft="mse": over rows * K); both weighted by row_weight where given. If no row is left, the
            part is 0. "sum", "batchmean" and "none" as for kl_div_tau; ignored rows count as 0.
        denominator: replaces the divisors of both parts by the same number.
        return_parts: return a named tuple (loss, hard, soft). The parts are computed in any case, carry no gradient, and stay on
            the device until they are read.
    """
    _check_logits(student_logits, teacher_logits)
    target = _check_target(target, student_logits)
    tau = _temperature("tau", tau)
    alpha = _number("alpha", alpha, "a number from 0 to 1", lambda x: 0 <= x <= 1)
    label_smoothing = _number("label_smoothing", label_smoothing, "a number from 0 to 1", lambda x: 0 <= x <= 1)
    ignore_index = _integer("ignore_index", ignore_index, "an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int of 64 bits; got {_shown(ignore_index)}")
    _check_choice("soft", soft, SOFT)
    _check_flag("return_parts", return_parts)
    if (student_logits.dtype == torch.float64) != (teacher_logits.dtype == torch.float64):
        if inplace_backward is True and student_logits.dtype != torch.float64:
            raise ValueError(
                f"inplace_backward takes no student_logits of {student_logits.dtype} beside teacher_logits of float64, "
                "since the other side is made float64 first"
            )
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    kind = SOFT.index(soft)
    if kind == 0 and _at_the_limit(tau, student_logits, teacher_logits):
        kind = 2
    values = _call(
        _ops.KD_LOSS,
        (tau if kind == 0 else 1.0, alpha, kind, ignore_index, label_smoothing),
        student_logits,
        teacher_logits,
        reduction,
        row_weight,
        denominator,
        num_classes,
        inplace_backward,
        backend,
        target,
    )
    return KDParts(*values) if return_parts else values[0]


def _at_the_limit(tau: float, student: Tensor, teacher: Tensor) -> bool:
    """Whether a loss at this temperature is computed as its limit."""
    return tau == math.inf or (tau >= LIMIT_TAU and torch.float64 not in (student.dtype, teacher.dtype))


def _temperature(name: str, value: object) -> float:
    if type(value) is float and SMALLEST_TAU <= value <= LARGEST_TAU:
        return value
    return _number(name, value, TAU_TAKEN, lambda x: SMALLEST_TAU <= x <= LARGEST_TAU or x == math.inf)


def _number(name: str, value: object, taken: str, fits: Callable[[float], bool]) -> float:
    """The value of a parameter that no gradient reaches; `taken` says what it may be."""
    if type(value) is float and fits(value):
        return value
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name} gets no gradient; got a tensor that requires grad. Pass a number, or {name}.item()")
        raise TypeError(f"{name} must be a number, not a tensor (reading it would wait for the device); pass {name}.item()")
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be {taken}; got {_type_of(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int
        number = math.nan
    if not fits(number):
        raise ValueError(f"{name} must be {taken}; got {_shown(value)}")
    return number


def _integer(name: str, value: object, taken: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be {taken}; got {_type_of(value)}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)  # type: ignore[return-value]


def _shown(value: object) -> str:
    """A number as an error shows it."""
    try:
        text = str(value)
    except ValueError:  # an int of more digits than Python prints
        return "an int of thousands of digits"
    return text if len(text) <= 50 else f"{text[:40]}..."


def _type_of(value: object) -> str:
    """A type's name as an error shows it: numpy's bool is none of Python's."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {_type_of(value)}")


def _check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor; got {'a nested one' if tensor.is_nested else f'layout {tensor.layout}'}"
        )


def _call(
    loss: _ops.Loss,
    parameters: tuple[float | bool, ...],
    student: Tensor,
    teacher: Tensor,
    reduction: str,
    row_weight: Tensor | None,
    denominator: Number | Tensor | None,
    num_classes: int | None,
    inplace: bool,
    backend: str,
    target: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Checks the logits and the options that the losses have in common, and runs one of them: (loss, parts...)."""
    _check_choice("reduction", reduction, REDUCTIONS)
    code = REDUCTIONS[reduction]
    if (
        row_weight is None
        and denominator is None
        and num_classes is None
        and inplace is False
        and isinstance(backend, str)
        and backend in DIRECT_BACKENDS
        and (found := _ops.direct(loss, student, teacher, target, code, parameters)) is not None
    ):
        return found
    _check_logits(student, teacher)
    _check_flag("inplace_backward", inplace)
    if row_weight is not None:
        row_weight = _check_row_weight(row_weight, student)
    divisor = None
    if denominator is not None:
        divisor, denominator = _check_denominator(denominator, student, reduction)
    if num_classes is not None or student.size(-1) != teacher.size(-1):
        num_classes = _check_num_classes(num_classes, student, teacher)
    else:
        num_classes = -1  # all columns
    backend = _resolve_backend(backend, student, loss)
    if inplace:
        _check_inplace(student, teacher, backend)
    elif not student.is_contiguous() and student.stride(-1) != 1:
        student = student.contiguous()
    if not teacher.is_contiguous() and teacher.stride(-1) != 1:
        teacher = teacher.contiguous()
    options = (row_weight, denominator, divisor, code, num_classes)
    if backend == "reference" or _ops.transformed() or _ops.exported_with_gradient(student, teacher):
        if target is not None:
            _check_classes(target, student, options, parameters)
        values = loss.reference(student, teacher, *options, *_ops.given(target), *parameters)
        return values if loss.values > 1 else (values,)
    if backend == "triton":
        loss = _ops.on_triton(loss)
    if target is None or torch.compiler.is_compiling():
        return _ops.apply(loss, student, teacher, target, options, parameters, inplace)
    try:
        return _ops.apply(loss, student, teacher, target, options, parameters, inplace)
    except RuntimeError as error:
        wrong = re.search(r"kdfast: (target must .*)", str(error))
        if wrong is None:
            raise
        raise ValueError(wrong[1]) from None


def _check_classes(target: Tensor, student: Tensor, options: _ops.Options, parameters: _ops.Parameters) -> None:
    """What the kernel does: on the CPU, where looking costs no wait, a target of a row that counts must be a class."""
    if student.device.type != "cpu" or _ops.transformed() or torch.compiler.is_compiling():
        return
    row_weight, num_classes, ignore_index = options[0], options[4], parameters[3]
    classes = num_classes if num_classes >= 0 else student.shape[-1]
    target = target.long()  # ignore_index may be wider than its type
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if row_weight is not None:
        wrong &= row_weight != 0
    try:
        found = bool(wrong.any())
    except RuntimeError:  # a fake tensor, or one that is traced, has no values
        return
    if found:
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"target must be from 0 to {classes - 1} or ignore_index = {ignore_index}; got {target.flatten()[row]} in row {row}"
        )


def _describe(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    # What is wrong is looked for only where something is: this test takes a third of the time.
    if not (
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and student.dtype in LOGIT_DTYPES
        and teacher.dtype in LOGIT_DTYPES
        and student.layout is STRIDED
        and teacher.layout is STRIDED
        and not (student.is_nested or teacher.is_nested)
        and student.device == teacher.device
        and student.dim() >= 2
        and (shape := student.shape) == teacher.shape
        and shape[-1] != 0
    ):
        _refuse_logits(student, teacher)


def _refuse_logits(student: Tensor, teacher: Tensor) -> None:
    """Says what is wrong with them, but for unequal widths, which _check_num_classes judges."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(logits).__name__}")
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {logits.dtype}")
        _check_dense(name, logits)
        if logits.dim() < 2:
            raise ValueError(f"{name} must have shape (..., K) with at least one leading dimension; got {_describe(logits)}")
        if logits.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one class (the last dimension); got {_describe(logits)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same leading dimensions; "
            f"got student_logits of {_describe(student)} and teacher_logits of {_describe(teacher)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            "student_logits and teacher_logits must be on one device; "
            f"got student_logits on {student.device} and teacher_logits on {teacher.device}"
        )


def _check_target(target: Tensor, student: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor; got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target must be int64 or int32, one class a row; got {target.dtype}")
    _check_dense("target", target)
    if target.shape != student.shape[:-1]:
        raise ValueError(
            f"target must have the logits' leading dimensions {tuple(student.shape[:-1])}; got shape {tuple(target.shape)}"
        )
    if target.device != student.device:
        raise ValueError(f"target must be on the logits' device {student.device}; got {target.device}")
    return target.contiguous()


def _check_num_classes(num_classes: int | None, student: Tensor, teacher: Tensor) -> int:
    """Where it is given, or the widths are unequal, which asks for it."""
    widths = student.shape[-1], teacher.shape[-1]
    if num_classes is None:
        raise ValueError(
            f"student_logits have {widths[0]} classes and teacher_logits {widths[1]}; "
            "pass num_classes to use the first num_classes columns of both (padded vocabularies)"
        )
    num_classes = _integer("num_classes", num_classes, "an int or None")
    if not 1 <= num_classes <= min(widths):
        raise ValueError(
            f"num_classes must be from 1 to the smaller width of the logits; got {_shown(num_classes)} for "
            f"student_logits of {widths[0]} and teacher_logits of {widths[1]} classes"
        )
    return num_classes


def _check_row_weight(row_weight: Tensor, student: Tensor) -> Tensor:
    if not isinstance(row_weight, Tensor):
        raise TypeError(f"row_weight must be a torch.Tensor or None; got {type(row_weight).__name__}")
    if row_weight.dtype != torch.bool and row_weight.dtype not in LOGIT_DTYPES:
        raise TypeError(
            "row_weight must be bool, float64, float32, bfloat16 or float16; "
            f"got {row_weight.dtype}. For an integer mask: mask.bool()"
        )
    _check_dense("row_weight", row_weight)
    if row_weight.shape != student.shape[:-1]:
        raise ValueError(
            f"row_weight must have the logits' leading dimensions {tuple(student.shape[:-1])}; got shape {tuple(row_weight.shape)}"
        )
    if row_weight.device != student.device:
        raise ValueError(f"row_weight must be on the logits' device {student.device}; got {row_weight.device}")
    if row_weight.requires_grad:
        raise ValueError("row_weight gets no gradient; got a tensor that requires grad. Pass row_weight.detach()")
    return row_weight.contiguous()


def _check_denominator(denominator: Number | Tensor, student: Tensor, reduction: str) -> tuple[float | None, Tensor | None]:
    """The denominator as a number, or as a tensor."""
    if reduction == "none":
        raise ValueError("denominator replaces the divisor of a scalar reduction; got one with reduction='none'")
    if isinstance(denominator, Tensor):
        _check_dense("denominator", denominator)
        if denominator.dim() != 0:
            raise ValueError(f"denominator must be a number or a 0-d tensor; got shape {tuple(denominator.shape)}")
        if denominator.dtype not in DENOMINATOR_DTYPES:
            raise TypeError(f"denominator must be float64, float32, bfloat16, float16, int64 or int32; got {denominator.dtype}")
        if denominator.device != student.device:
            raise ValueError(f"denominator must be on the logits' device {student.device}; got {denominator.device}")
        if denominator.requires_grad:
            raise ValueError("denominator gets no gradient; got a tensor that requires grad. Pass denominator.detach()")
        return None, denominator
    return _number(
        "denominator", denominator, DENOMINATOR_TAKEN, lambda x: SMALLEST_DENOMINATOR <= x <= LARGEST_DENOMINATOR
    ), None


MOST_INPLACE_DIMS = 6  # RowLayout::kMaxDims of csrc/kernels.h


def _check_inplace(student: Tensor, teacher: Tensor, backend: str) -> None:
    if backend == "reference":
        raise ValueError("inplace_backward needs a kernel; got backend 'reference'")
    compiling = torch.compiler.is_compiling()
    base = None if compiling else student._base
    # (The base's own requires_grad tells nothing: the leaf may be another view of it.)
    if student.requires_grad and (student.is_leaf or (base is not None and base.is_leaf)):
        raise ValueError(
            "inplace_backward would overwrite student_logits, a leaf that requires grad or a view of one; it takes the output of a model"
        )
    if student.stride(-1) != 1:
        raise ValueError(
            f"inplace_backward takes student_logits whose class dimension has stride 1; got strides {student.stride()}"
        )
    if compiling:
        return  # nothing is overwritten then
    extent = 1  # of the dimensions of smaller strides, in elements
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1:
            if stride < extent and student.numel():
                raise ValueError(
                    f"inplace_backward takes student_logits whose rows do not overlap; got strides {student.stride()}"
                )
            extent += (size - 1) * stride
    dims, merged = 0, None
    for stride, size in zip(student.stride()[:-1], student.shape[:-1], strict=True):
        if size > 1:
            dims += merged != size * stride
            merged = stride
    if dims > MOST_INPLACE_DIMS:
        raise ValueError(
            f"inplace_backward takes student_logits of at most {MOST_INPLACE_DIMS} leading dimensions of independent strides; "
            f"got shape {tuple(student.shape)}, strides {student.stride()}"
        )
    if student.is_neg():
        raise ValueError("inplace_backward takes no lazily negated student_logits; pass student_logits.resolve_neg()")
    if _share_memory(student, teacher):
        raise ValueError(
            "inplace_backward would overwrite teacher_logits, which lie in the same memory as student_logits; pass a clone of them"
        )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the stretches from the first to the last element overlap: in memory, or, of tensors without addresses (meta, of
    subclasses, or under transforms), in one storage."""
    addressable = {type(a), type(b)} <= {Tensor, torch.nn.Parameter} and not (a.is_meta or _ops.transformed())
    if not (a.numel() and b.numel() and (addressable or torch._C._is_alias_of(a, b))):  # type: ignore[attr-defined]
        return False
    (begin, end), (other, other_end) = (
        (first, first + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))))
        for x in (a, b)
        for first in (x.data_ptr() if addressable else x.storage_offset() * x.element_size(),)
    )
    return bool(begin < other_end and other < end)


def _default_backend() -> str:
    backend = os.environ.get("KDFAST_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"the environment variable KDFAST_BACKEND must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


DEFAULT_BACKEND = _default_backend()
# Those that mean C++ on the CPU.
DIRECT_BACKENDS = ("auto", "cpp") if DEFAULT_BACKEND in ("auto", "cpp") else ("cpp",)


def _resolve_backend(backend: str, student: Tensor, loss: _ops.Loss) -> str:
    """The backend to run, one that has the loss on the student's device: "cpp", "triton" or "reference"."""
    _check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        backend = DEFAULT_BACKEND
    if student.is_cpu and backend in ("auto", "cpp"):
        return "cpp"
    device = student.device.type
    has_kernel = device in ("cpu", "meta") or (device == "cuda" and loss.has_cuda_kernels)
    too_old = _too_old(student.device) if device == "cuda" else None
    if backend == "auto":
        if has_kernel and too_old is None:
            return "cpp"
        if device == "cuda" and _missing_for_triton(student.device) is None:
            return "triton"
        _warn_of_reference(device, loss, too_old)
        return "reference"
    if backend == "triton":
        missing = _missing_for_triton(student.device)
        if missing is not None:
            raise ValueError(f"backend 'triton' cannot run here: {missing}; or pass backend='cpp' or 'reference'")
    if backend == "cpp" and not has_kernel:
        raise ValueError(
            f"backend 'cpp' has no kernels of {loss.name} for logits on {student.device} in this build "
            "(python -m kdfast.info shows what it has); for CUDA, rebuild where nvcc is found (KDFAST_CUDA=1 makes its absence an "
            "error), or pass backend='triton' or 'reference'"
        )
    if backend == "cpp" and too_old is not None:
        raise ValueError(f"backend 'cpp' cannot run here: {too_old}; or pass backend='reference'")
    return backend


OLDEST_CAPABILITY = (8, 0)
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _too_old(device: torch.device) -> str | None:
    """What a GPU lacks for any kernel of ours; None where it lacks nothing."""
    if torch.version.hip is not None:
        return None
    # (A compiler cannot look into the cache, but knows a device's properties.)
    return _older_than_ours(device) if torch.compiler.is_compiling() else _older_than_ours_cached(device)


def _older_than_ours(device: torch.device) -> str | None:
    if not torch.cuda.is_available():  # a fake tensor's device
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability >= OLDEST_CAPABILITY:
        return None
    return f"{device} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0 or newer"


_older_than_ours_cached = functools.lru_cache(_older_than_ours)


def _missing_for_triton(device: torch.device) -> str | None:
    """What backend "triton" lacks for logits on a device; None where it runs."""
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton)"
    if device.type == "cuda":
        return _too_old(device)
    if device.type == "meta" or (device.type == "cpu" and TRITON_INTERPRETED):
        return None
    return f"the logits are on {device} and it takes a GPU (for tests, TRITON_INTERPRET=1 in the environment runs it on the CPU, slowly)"


_warned: set[tuple[str, str]] = set()


def _warn_of_reference(device: str, loss: _ops.Loss, why: str | None) -> None:
    if (device, loss.name) not in _warned and not torch.compiler.is_compiling():
        _warned.add((device, loss.name))
        warnings.warn(
            f"kdfast has no kernels of {loss.name} for {device!r} {f'here ({why})' if why else 'in this build'}; it runs as plain "
            "torch there. backend='reference' says that this is meant",
            stacklevel=5,
        )
