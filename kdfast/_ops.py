"""The operators of csrc/ops.cpp as torch sees them: shapes for tracing, and gradients.

The operators themselves are not differentiable. One autograd.Function for all losses stands outside them; transforms that it cannot
serve (functorch's levels, forward-mode AD, create_graph) go to reference.py, which torch differentiates.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdfast import _C, reference
from kdfast._load import HAS_CUDA_KERNELS

# row_weight, denominator as a tensor, denominator as a number, reduction, num_classes
Options = tuple[Tensor | None, Tensor | None, float | None, int, int]
Parameters = tuple[float | bool, ...]
Inputs = tuple[Tensor | None, ...]


class Loss(NamedTuple):
    """One loss: its operators, the numbers a row that its forward leaves for its backward, its definition in plain torch."""

    forward: Any
    forward_grad: Any
    forward_grads: Any
    backward: Any
    backward_inplace: Any
    scale_gradient: Any
    scale_gradient_inplace: Any
    row_stats: Callable[..., int]
    reference: Callable[..., Any]
    values: int  # what forward returns beside the numbers of the rows: the loss, and parts of it that have no gradient
    name: str
    has_cuda_kernels: bool  # C++, in this build
    direct: Callable[..., bool] | None  # csrc/direct.cpp's way to the CPU's kernels


KINDS = ("forward", "forward_grad", "forward_grads", "backward", "backward_inplace")
SCALING = ("scale_gradient", "scale_gradient_inplace")


def _loss(namespace: str, name: str, row_stats: Callable[..., int], definition: Callable[..., Any], values: int = 1) -> Loss:
    ops = getattr(torch.ops, namespace)
    operators = [getattr(ops, each).default for each in (*(f"{name}_{kind}" for kind in KINDS), *SCALING)]
    has_cuda_kernels = HAS_CUDA_KERNELS and torch._C._dispatch_has_kernel_for_dispatch_key(operators[0].name(), "CUDA")
    direct = getattr(_C, name) if namespace == "kdfast" else None
    return Loss._make([*operators, row_stats, definition, values, name, has_cuda_kernels, direct])


# The numbers a row, which the fakes need to know: as KlStat, MseStat, HuberStat and HardStat of csrc/kl_math.h count them.


def _kl_div_tau(namespace: str) -> Loss:
    return _loss(namespace, "kl_div_tau", lambda tau, teacher_tau, scale_by_tau_squared: 9, reference.kl_div_tau)


def _logit_mse(namespace: str) -> Loss:
    return _loss(namespace, "logit_mse", lambda center, tau_limit: 4 if center else 0, reference.logit_mse)


def _logit_huber(namespace: str) -> Loss:
    return _loss(namespace, "logit_huber", lambda delta, smooth_l1, center: 5 if center else 0, reference.logit_huber)


def _kd_loss(namespace: str) -> Loss:
    def row_stats(target: Tensor, tau: float, alpha: float, soft: int, ignore_index: int, label_smoothing: float) -> int:
        return 3 + (9 if soft == 0 else 4)

    return _loss(namespace, "kd_loss", row_stats, reference.kd_loss, values=3)


def _triton_operator(name: str) -> Callable[..., Any]:
    """One of kdfast.triton's, which is imported by its first call."""

    def run(*args: Any) -> Any:
        from kdfast.triton import OPERATORS

        return OPERATORS[name](*args)

    return run


def _define(library: torch.library.Library, schema: str, name: str) -> None:
    library.define(schema)
    for key in ("CUDA", "CPU"):  # the CPU's is for Triton's interpreter
        library.impl(name, _triton_operator(name), key)


def _define_triton(losses: tuple[Loss, ...]) -> list[torch.library.Library]:
    """Gives every operator kdfast::X a twin kdfast_triton::X, and itself the same kernel on CUDA where the build has none there."""
    twins = torch.library.Library("kdfast_triton", "DEF")
    stand_ins = torch.library.Library("kdfast", "IMPL")
    for operator in dict.fromkeys(operator for loss in losses for operator in loss[:7]):
        name = operator.name().removeprefix("kdfast::").removesuffix(".default")
        schema = str(operator._schema).removeprefix("kdfast::")
        _define(twins, schema, name)
        if not HAS_CUDA_KERNELS:
            stand_ins.impl(name, _triton_operator(name), "CUDA")
    return [twins, stand_ins]  # an implementation lives as long as its library


_MAKERS = (_kl_div_tau, _logit_mse, _logit_huber, _kd_loss)
_COMPILED = KL_DIV_TAU, LOGIT_MSE, LOGIT_HUBER, KD_LOSS = tuple(make("kdfast") for make in _MAKERS)
_libraries = _define_triton(_COMPILED)
_TRITON = {loss.name: loss for loss in (make("kdfast_triton") for make in _MAKERS)}
LOSSES = (*_COMPILED, *_TRITON.values())


def on_triton(loss: Loss) -> Loss:
    """The same loss by Triton's kernels."""
    return _TRITON[loss.name]


# Private names of torch. Bound here, since looking them up is most of what they cost.
_functorch_active, _traced = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_profiled, _graph_is_kept = torch._C._autograd._profiler_enabled, torch._C._autograd._get_current_graph_task_keep_graph
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_is_batched_by_vmap, _is_batched_by_autograd = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active, which the operators cannot serve."""
    return _functorch_active() or forward_ad._current_level >= 0


def exported_with_gradient(student: Tensor, teacher: Tensor) -> bool:
    """Whether torch.export would keep the operator, which has no gradient by itself, in the place of a function that has one."""
    return torch.compiler.is_exporting() and torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)


def _watched() -> bool:
    """Whether anybody sees the operators that are called: a mode, the profiler, a tracer."""
    return bool(_dispatch_modes() or _function_modes() or _profiled() or _traced())


def _hooked() -> bool:
    """Whether what is saved now goes through hooks: what they give back may be anybody's memory, and nobody looks at its version."""
    return _saving_hooks(False) is not None


def _is_batched(grad_loss: Tensor) -> bool:
    """Whether it is many numbers to one saved tensor: is_grads_batched, or torch.vmap of a backward pass."""
    return bool(_is_batched_by_vmap(grad_loss) or _is_batched_by_autograd(grad_loss))


_strided = torch.strided
_SCALARS = [torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)]


def direct(
    loss: Loss, student: Tensor, teacher: Tensor, target: Tensor | None, reduction: int, parameters: Parameters
) -> tuple[Tensor, ...] | None:
    """A plain call on the CPU for one thread, of all columns and without weights or denominator, past torch's dispatcher, which
    would cost more than a small one's arithmetic: (loss, parts...). None where it is no such call: nothing is checked before."""
    if (
        torch.compiler.is_compiling()
        or type(student) is not Tensor
        or type(teacher) is not Tensor
        or student.layout is not _strided
        or student.is_nested
        or (student.numel() > _C.PAIRS_PER_TASK and torch.get_num_threads() > 1)
        or student.is_neg()
        or teacher.is_neg()
        or _functorch_active()
        or forward_ad._current_level >= 0
        or _watched()
    ):
        return None
    gradient = None
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        if _in_forward(student, teacher, reduction) != 1 or _made_in_inference_mode(teacher, target) is not None:
            return None
        gradient = torch.empty_like(student)
    scalar = _SCALARS[student.dtype is torch.float64 or teacher.dtype is torch.float64]
    values: tuple[Tensor, ...]
    if reduction == 0:
        values = tuple(scalar.new_empty(student.shape[:-1]) for _ in range(loss.values))
    elif loss.values == 1:
        values = (torch.empty_like(scalar),)  # the fastest of several ways
    else:
        values = tuple(torch.empty_like(scalar) for _ in range(loss.values))
    own: tuple[Any, ...] = parameters if target is None else (target, *parameters)
    if loss.direct is None or not loss.direct(values, gradient, student, teacher, reduction, *own):
        return None
    if gradient is None:
        return values
    result: tuple[Tensor, ...] = _DirectFunction.apply(
        student, teacher, target, (loss, reduction, parameters, _hooked()), values, gradient
    )
    return result


def _in_forward(student: Tensor, teacher: Tensor, reduction: int) -> int:
    """How many gradients the forward writes, of a scalar: the student's alone, or both. Not in float16, where a gradient that
    GradScaler has not scaled yet underflows."""
    if reduction == 0 or student.dtype is torch.float16:
        return 0
    if not teacher.requires_grad:
        return 1
    return 2 if student.requires_grad and teacher.dtype is not torch.float16 else 0


def apply(
    loss: Loss,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    options: Options,
    parameters: Parameters,
    inplace: bool,
) -> tuple[Tensor, ...]:
    """Runs a loss's kernels, under autograd where a gradient is required: (loss, parts...)."""
    if not (torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)):
        values: tuple[Tensor, ...] = loss.forward(student, teacher, *options, *given(target), *parameters, False)[:-1]
        return values
    compiling = torch.compiler.is_compiling()
    hooked = not compiling and _hooked()
    inplace = inplace and not (compiling or hooked)  # what others need would be overwritten, unseen
    in_forward = 0 if inplace else _in_forward(student, teacher, options[3])
    call = (LOSSES.index(loss), options[2:], parameters, in_forward, inplace, hooked)
    result: tuple[Tensor, ...] = _Function.apply(student, teacher, options[0], options[1], target, call)
    return result


def given(target: Tensor | None) -> tuple[Tensor, ...]:
    """The target as an argument, of a loss that takes one."""
    return () if target is None else (target,)


class _Function(torch.autograd.Function):
    """Takes ctx in forward: a separate setup_context costs 20 us a call."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        row_weight: Tensor | None,
        denominator: Tensor | None,
        target: Tensor | None,
        call: tuple[int, tuple[float | None, int, int], Parameters, int, bool, bool],
    ) -> tuple[Tensor, ...]:
        index, numbers, parameters, in_forward, *_ = ctx.call = call
        loss = LOSSES[index]
        kernel = (loss.forward, loss.forward_grad, loss.forward_grads)[in_forward]
        for_backward = () if in_forward else (True,)
        values: tuple[Tensor, ...] = kernel(
            student, teacher, row_weight, denominator, *numbers, *given(target), *parameters, *for_backward
        )
        inputs: Inputs = (student, teacher, row_weight, denominator, target)
        ctx.unsaved = None if torch.compiler.is_compiling() else _made_in_inference_mode(*inputs)
        if ctx.unsaved is not None:
            inputs = tuple(x if y is None else None for x, y in zip(inputs, ctx.unsaved, strict=True))
        ctx.save_for_backward(*inputs, *values[loss.values :])
        if loss.values > 1:
            ctx.mark_non_differentiable(*values[1 : loss.values])
            ctx.set_materialize_grads(False)
        return values[: loss.values]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *of_parts: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # not materialized, beside parts
            return (None,) * 6
        index, numbers, parameters, in_forward, inplace, hooked = ctx.call
        loss = LOSSES[index]
        saved, unsaved = ctx.saved_tensors, ctx.unsaved
        if unsaved is not None and not _graph_is_kept():
            ctx.unsaved = None
        inputs, kept = saved[:5], saved[5:]
        create_graph = torch.is_grad_enabled()
        for_student, for_teacher = ctx.needs_input_grad[:2]
        if in_forward and not create_graph:
            grad_student = _scaled(loss, kept[0], grad_loss, hooked) if for_student else None
            grad_teacher = _scaled(loss, kept[1], grad_loss, hooked) if for_teacher else None
            return grad_student, grad_teacher, None, None, None, None
        if unsaved is not None:
            inputs = [x if y is None else y for x, y in zip(inputs, unsaved, strict=True)]
        student, teacher, row_weight, denominator, target = inputs
        options = (row_weight, denominator, *numbers)
        parameters = (*given(target), *parameters)
        grad_student = grad_teacher = None
        if create_graph:  # the gradient must be differentiable itself
            grad_student, grad_teacher = _reference_gradients(
                loss, grad_loss, student, teacher, options, parameters, for_student, for_teacher
            )
        elif inplace and for_student and not (torch.compiler.is_compiling() or _is_batched(grad_loss)):
            grad_teacher = loss.backward_inplace(
                _row_numbers(grad_loss), student, teacher, kept[0], *options, *parameters, for_teacher
            )
            torch.autograd.graph.increment_version(student)
            grad_student = student.detach()
        else:
            grad_student, grad_teacher = loss.backward(
                _row_numbers(grad_loss), student, teacher, kept[0], *options, *parameters, for_student, for_teacher
            )
        return grad_student if for_student else None, grad_teacher if for_teacher else None, None, None, None, None


class _DirectFunction(torch.autograd.Function):
    """The same for what `direct` has computed already: one kind of call alone, and a tenth less of its time."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        call: tuple[Loss, int, Parameters, bool],
        values: tuple[Tensor, ...],
        gradient: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        # In _Function's order: a checkpoint may save by the one and restore by the other.
        ctx.save_for_backward(student, teacher, target, gradient)
        if len(values) > 1:
            ctx.mark_non_differentiable(*values[1:])
            ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *of_parts: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # not materialized, beside parts
            return (None,) * 6
        loss, reduction, parameters, hooked = ctx.call
        student, teacher, target, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            options = (None, None, None, reduction, -1)
            gradient, _ = _reference_gradients(
                loss, grad_loss, student, teacher, options, (*given(target), *parameters), True, False
            )
        else:
            gradient = _scaled(loss, gradient, grad_loss, hooked)
        return gradient, None, None, None, None, None


def _made_in_inference_mode(*inputs: Tensor | None) -> Inputs | None:
    """The inputs that autograd does not save, since they have no version counter, None for the others; None if it saves all. (Torch
    lets nobody change them in place but under inference_mode; README.md, Limits.)"""
    for x in inputs:  # any() over a generator takes three times as long
        if x is not None and x.is_inference():
            return tuple(x if x is not None and x.is_inference() else None for x in inputs)
    return None


def _scaled(loss: Loss, gradient: Tensor, grad_loss: Tensor, hooked: bool) -> Tensor:
    """gradient * grad_loss: in place where this backward is the saved gradient's last use (nothing is written where grad_loss is 1),
    else a new tensor."""
    if torch.compiler.is_compiling() or hooked or _graph_is_kept() or _is_batched(grad_loss):
        scaled: Tensor = loss.scale_gradient(gradient.contiguous(), grad_loss)  # (hooks may give back other strides)
        return scaled
    plain = type(gradient) is type(grad_loss) is Tensor and not (grad_loss.is_neg() or _watched())
    if plain and _C.scale_gradient(gradient, grad_loss):
        return gradient
    loss.scale_gradient_inplace(gradient, grad_loss)
    return gradient


def _row_numbers(grad_loss: Tensor) -> Tensor:
    """A form the kernels read: contiguous, or one number for all rows."""
    return grad_loss if grad_loss.is_contiguous() or not any(grad_loss.stride()) else grad_loss.contiguous()


def _reference_gradients(
    loss: Loss,
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    options: Options,
    parameters: tuple[Any, ...],
    for_student: bool,
    for_teacher: bool,
) -> tuple[Tensor | None, Tensor | None]:
    # Partial derivatives: where one side is a function of the other, autograd adds that path itself. (Views, so that it can.)
    student, teacher = student.view_as(student), teacher.view_as(teacher)
    wanted = [logits for logits, needed in ((student, for_student), (teacher, for_teacher)) if needed]
    value = loss.reference(student, teacher, *options, *parameters)
    value = value[0] if loss.values > 1 else value
    gradients = list(torch.autograd.grad(value, wanted, grad_loss, create_graph=True))
    grad_student = gradients.pop(0) if for_student else None
    return grad_student, gradients.pop(0) if for_teacher else None


def _register_fakes(loss: Loss) -> None:
    """Shapes and dtypes of what the operators return, for tracing."""

    def accumulate(student: Tensor, teacher: Tensor) -> torch.dtype:
        return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32

    def loss_shape(student: Tensor, reduction: int) -> torch.Size:
        return student.shape[:-1] if reduction == 0 else torch.Size(())

    def gradient(logits: Tensor, wanted: bool) -> Tensor:
        return logits.new_empty(logits.shape if wanted else (0,))

    def forward(
        student: Tensor,
        teacher: Tensor,
        row_weight: Any,
        denominator: Any,
        divisor: Any,
        reduction: int,
        num_classes: int,
        *others: Any,
    ) -> tuple[Tensor, ...]:
        *rest, for_backward = others
        dtype = accumulate(student, teacher)
        rows = math.prod(student.shape[:-1])  # torch.Size.numel() would fix the number of rows while tracing
        return (
            *(student.new_empty(loss_shape(student, reduction), dtype=dtype) for _ in range(loss.values)),
            student.new_empty((rows, loss.row_stats(*rest) if for_backward else 0), dtype=dtype),
        )

    def forward_grad(
        student: Tensor,
        teacher: Tensor,
        row_weight: Any,
        denominator: Any,
        divisor: Any,
        reduction: int,
        num_classes: int,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        dtype = accumulate(student, teacher)
        return (*(student.new_empty((), dtype=dtype) for _ in range(loss.values)), gradient(student, True))

    def forward_grads(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return (*forward_grad(student, teacher, *rest), gradient(teacher, True))

    def backward(grad_loss: Tensor, student: Tensor, teacher: Tensor, row_stats: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        for_student, for_teacher = rest[-2:]
        return gradient(student, for_student), gradient(teacher, for_teacher)

    def backward_inplace(grad_loss: Tensor, student: Tensor, teacher: Tensor, row_stats: Tensor, *rest: Any) -> Tensor:
        return gradient(teacher, rest[-1])

    for operator, fake in zip(loss[:5], (forward, forward_grad, forward_grads, backward, backward_inplace), strict=True):
        torch.library.register_fake(operator.name())(fake)


for _loss_of in LOSSES:
    _register_fakes(_loss_of)
for _each in ("kdfast", "kdfast_triton"):
    torch.library.register_fake(f"{_each}::scale_gradient")(lambda gradient, grad_loss: torch.empty_like(gradient))
    torch.library.register_fake(f"{_each}::scale_gradient_inplace")(lambda gradient, grad_loss: None)
