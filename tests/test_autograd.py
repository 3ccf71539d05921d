"""Derivatives of every order and every transform: the right value, or a clear error; never silently wrong or dropped.

Values are compared with the eager chain in float64, which autograd differentiates by itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import operators
import pytest
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    Objective,
    Where,
    check_grad,
    check_loss,
    default_target,
    eager,
    logits,
    loss_of,
    oracle,
)
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kdfast
from kdfast import _ops

REDUCTIONS = ("none", "sum", "mean", "batchmean")
VARIANTS: dict[str, dict[str, Any]] = {
    "kl": {"loss": "kl_div_tau", "tau": 2.0},
    "kl-two-tau": {"loss": "kl_div_tau", "tau": 2.0, "teacher_tau": 0.7},
    "kl-unscaled": {"loss": "kl_div_tau", "tau": 3.0, "scale_by_tau_squared": False},
    "kl-inf": {"loss": "kl_div_tau", "tau": INF},
    "mse": {"loss": "logit_mse"},
    "mse-center": {"loss": "logit_mse", "center": True},
    "huber": {"loss": "logit_huber", "delta": 0.7},
    "huber-center": {"loss": "logit_huber", "center": True},
    "smooth-l1": {"loss": "logit_huber", "kind": "smooth_l1", "delta": 0.5},
    "kd": {"loss": "kd_loss", "tau": 2.0, "alpha": 0.4, "label_smoothing": 0.1},
    "kd-inf": {"loss": "kd_loss", "tau": INF, "alpha": 0.6},
    "kd-mse": {"loss": "kd_loss", "soft": "mse", "alpha": 0.3},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
# Transforms are a CPU matter: torch's own kernels do most of the work.
backends = pytest.mark.parametrize("backend", ["cpp", "reference"])
EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "weights": {"row_weight": torch.tensor([0.5, 0.0, 2.0])},
    "mask": {"row_weight": torch.tensor([True, False, True])},
    "denominator": {"denominator": torch.tensor(3.0)},
    "num_classes": {"num_classes": 3},
}
# Weights with every reduction; the rest once: a mask is a weight, a divisor is a divisor (the values are test_semantics.py's matter).
extras = pytest.mark.parametrize(
    "reduction, extra",
    [(r, e) for r in REDUCTIONS for e in ("none", "weights")] + [("mean", e) for e in ("mask", "denominator", "num_classes")],
)


def pair(shape: tuple[int, ...] = (3, 5), grad: bool = True, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    s, t = logits("typical", shape, (dtype, dtype))
    return s.requires_grad_(grad), t.requires_grad_(grad)


def ours(variant: str, backend: str = "cpp", **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    options = VARIANTS[variant] | options
    loss = options.pop("loss")

    def call(s: Tensor, t: Tensor) -> Tensor:
        target = (
            {"target": default_target(s.shape[:-1], options.get("num_classes") or s.shape[-1])} if loss == "kd_loss" else {}
        )
        return getattr(kdfast, loss)(s, t, backend=backend, **target, **options)

    return call


def theirs(variant: str, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    options = VARIANTS[variant] | options
    return lambda s, t: eager(student=s, teacher=t, **options)


def same(got: Any, want: Any, rtol: float = 1e-11) -> None:
    """Relative L2: 1e-11 is 1e5 float64 roundings, what third derivatives of the eager chain need at these sizes."""
    got, want = (x if isinstance(x, (tuple, list)) else (x,) for x in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, (tuple, list)):
            same(a, b, rtol)
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        error, norm = torch.linalg.norm(a - b), torch.linalg.norm(b)
        assert norm > 0, "nothing is compared"
        assert error <= rtol * norm, f"relative error {error / norm:.2e}"


# ---------------------------------------------------------------------------------------------------- gradcheck,
# gradgradcheck


@pytest.mark.contract("first derivatives: student, teacher, both (gradcheck)")
@extras
@variants
@backends
def test_gradcheck(backend: str, variant: str, reduction: str, extra: str) -> None:
    """Student and teacher together, then each alone (a scalar's: written during the forward, but for the teacher's alone)."""
    if backend == "reference" and reduction in ("sum", "batchmean"):
        return  # autograd differentiates the division by a number
    f = ours(variant, backend, reduction=reduction, **EXTRAS[extra])
    s, t = pair((3, 4))
    same(f(s, t), theirs(variant, reduction=reduction, **EXTRAS[extra])(s, t))
    assert gradcheck(f, (s, t), check_forward_ad=backend == "reference")  # forward mode runs the reference in any case
    assert gradcheck(f, (s, t.detach())) and gradcheck(f, (s.detach(), t))


@pytest.mark.contract("second derivatives: `create_graph`, gradgradcheck")
@extras
@variants
def test_gradgradcheck(variant: str, reduction: str, extra: str) -> None:
    """Whatever the backend, the second derivative is the reference's; here the kernels hand over to it."""
    f = ours(variant, reduction=reduction, **EXTRAS[extra])
    s, t = pair((3, 4))
    assert gradgradcheck(f, (s, t))
    if extra == "none":
        assert gradgradcheck(f, (s, t.detach())) and gradgradcheck(ours(variant, "reference", reduction=reduction), (s, t))


@variants
@backends
def test_sides_that_depend_on_each_other(backend: str, variant: str) -> None:
    """One tensor on both sides, and a teacher made from the student: each path counts once, in either order of derivative."""
    x = pair((4, 7))[0]

    def derivatives(f: Callable[[Tensor, Tensor], Tensor], teacher_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        student = 2 * x
        (plain,) = torch.autograd.grad(f(student, teacher_of(student)), x)
        student = 2 * x
        (first,) = torch.autograd.grad(f(student, teacher_of(student)), x, create_graph=True)
        return [plain, first.detach(), *torch.autograd.grad(first.square().sum(), x)]

    for teacher_of in (torch.sin, lambda student: student):
        got = derivatives(ours(variant, backend, reduction="sum"), teacher_of)
        want = derivatives(theirs(variant, reduction="sum"), teacher_of)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.contract("second derivatives: `create_graph`, gradgradcheck")
@reductions
@variants
@backends
def test_first_and_second_derivatives_are_those_of_eager(backend: str, variant: str, reduction: str) -> None:
    s, t = pair((4, 7))
    up = torch.linspace(0.5, 2, 4, dtype=F64)
    w = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=F64)

    def derivatives(f: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        value = f(s, t)
        first = torch.autograd.grad(value, (s, t), up if value.dim() else up[1], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].pow(3).sum(), (s, t))
        return [value.detach(), *(x.detach() for x in first), *second]

    same(derivatives(ours(variant, backend, reduction=reduction)), derivatives(theirs(variant, reduction=reduction)))
    same(
        derivatives(ours(variant, backend, reduction=reduction, row_weight=w)),
        derivatives(theirs(variant, reduction=reduction, row_weight=w)),
    )


@variants
@backends
def test_second_derivative_reaches_grad_output(backend: str, variant: str) -> None:
    """The loss multiplied by a parameter: d2/(d scale d student) is the gradient itself."""
    s, t = pair()
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def mixed(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        (g,) = torch.autograd.grad(f(s, t) * scale, s, create_graph=True)
        return torch.autograd.grad(g.square().sum(), scale)[0]

    same(mixed(ours(variant, backend)), mixed(theirs(variant)))


@pytest.mark.contract("a gradient-penalty training step")
@variants
@backends
def test_gradient_penalty_step(backend: str, variant: str) -> None:
    """create_graph in use: loss + |d loss / d logits|**2, through a layer, to its weights."""
    x = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = pair((6, 5), grad=False)[1]

    def step(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weight = torch.linspace(-1, 1, 20, dtype=F64).reshape(4, 5).requires_grad_()
        out = x @ weight
        value = f(out, t)
        (g,) = torch.autograd.grad(value, out, create_graph=True)
        (value + g.square().sum()).backward()
        assert weight.grad is not None
        return weight.grad

    same(step(ours(variant, backend)), step(theirs(variant)))


def test_third_derivative() -> None:
    s, t = pair((2, 4))

    def third(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        (a,) = torch.autograd.grad(f(s, t), s, create_graph=True)
        (b,) = torch.autograd.grad(a.square().sum(), s, create_graph=True)
        return torch.autograd.grad(b.square().sum(), s)[0]

    same(third(ours("kl")), third(theirs("kl")))


# ----------------------------------------------------------------------------------------------------------- forward
# mode, func


@pytest.mark.contract("forward-mode AD: dual numbers, forward over reverse")
@reductions
@variants
@backends
def test_forward_mode(backend: str, variant: str, reduction: str) -> None:
    """The tangent must arrive: of the student, of the teacher, of both."""
    s, t = pair(grad=False)
    ds, dt = (torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))

    def tangent(f: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            x = s if a is None else forward_ad.make_dual(s, a)
            y = t if b is None else forward_ad.make_dual(t, b)
            primal, out = forward_ad.unpack_dual(f(x, y))
        assert out is not None, "the tangent was dropped"
        return primal, out

    for a, b in ((ds, None), (None, dt), (ds, dt)):
        same(tangent(ours(variant, backend, reduction=reduction), a, b), tangent(theirs(variant, reduction=reduction), a, b))


@pytest.mark.contract("forward-mode AD: dual numbers, forward over reverse")
@variants
@backends
def test_forward_over_reverse(backend: str, variant: str) -> None:
    """A Hessian-vector product by a dual number through backward."""
    s, t = pair(grad=False)
    v = torch.ones_like(s).cumsum(-1)

    def product(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            x = forward_ad.make_dual(s.clone().requires_grad_(), v)
            (g,) = torch.autograd.grad(f(x, t), x, create_graph=True)
            out = forward_ad.unpack_dual(g).tangent
        assert out is not None, "the tangent was dropped"
        return out.detach()

    same(product(ours(variant, backend)), product(theirs(variant)))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, s, t: torch.func.grad(f, argnums=(0, 1))(s, t),
    "grad_and_value": lambda f, s, t: torch.func.grad_and_value(f)(s, t),
    "vjp": lambda f, s, t: torch.func.vjp(f, s, t)[1](torch.tensor(0.7, dtype=F64)),
    "jvp": lambda f, s, t: torch.func.jvp(f, (s, t), (t, s)),
    "jacrev": lambda f, s, t: torch.func.jacrev(f, argnums=(0, 1))(s, t),
    "jacfwd": lambda f, s, t: torch.func.jacfwd(f, argnums=(0, 1))(s, t),
    "hessian": lambda f, s, t: torch.func.hessian(f, argnums=(0, 1))(s, t),
    "reverse over reverse": lambda f, s, t: torch.func.jacrev(torch.func.jacrev(f))(s, t),
    "linearize": lambda f, s, t: torch.func.linearize(f, s, t)[1](t, s),
}


@pytest.mark.contract("`torch.func`: grad, vjp, jvp, jacrev, jacfwd, hessian, linearize")
@pytest.mark.parametrize("transform", TRANSFORMS)
@variants
@backends
def test_torch_func(backend: str, variant: str, transform: str) -> None:
    s, t = pair(grad=False)
    same(TRANSFORMS[transform](ours(variant, backend), s, t), TRANSFORMS[transform](theirs(variant), s, t))


FUNCTIONAL: dict[str, Callable[..., Any]] = {
    "vjp": lambda f, s, t: torch.autograd.functional.vjp(f, (s, t), torch.tensor(0.7, dtype=F64)),
    "jvp": lambda f, s, t: torch.autograd.functional.jvp(f, (s, t), (t, s)),
    "jacobian": lambda f, s, t: torch.autograd.functional.jacobian(f, (s, t)),
    "jacobian, forward mode": lambda f, s, t: torch.autograd.functional.jacobian(
        f, (s, t), vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda f, s, t: torch.autograd.functional.hessian(f, (s, t)),
    "hessian, vectorized": lambda f, s, t: torch.autograd.functional.hessian(f, (s, t), vectorize=True),
    "hvp": lambda f, s, t: torch.autograd.functional.hvp(f, (s, t), (t, s)),
    "vhp": lambda f, s, t: torch.autograd.functional.vhp(f, (s, t), (t, s)),
}


@pytest.mark.contract("`torch.autograd.functional`")
@pytest.mark.parametrize("transform", FUNCTIONAL)
@variants
@backends
def test_autograd_functional(backend: str, variant: str, transform: str) -> None:
    s, t = pair(grad=False)
    same(FUNCTIONAL[transform](ours(variant, backend), s, t), FUNCTIONAL[transform](theirs(variant), s, t))


@pytest.mark.contract("`torch.vmap`: any in_dims and out_dims")
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 1), (0, None), (None, 0), (1, 0), (2, 2)])
@variants
@backends
def test_vmap(backend: str, variant: str, in_dims: tuple[int | None, int | None]) -> None:
    """A batch of independent problems, each (3, 5), mapped over any dimension; the other side shared or mapped too."""
    base = pair((4, 3, 5), grad=False)
    s, t = (x[0] if d is None else x.movedim(0, d) for x, d in zip(base, in_dims, strict=True))
    mapped = torch.vmap(ours(variant, backend), in_dims=in_dims)(s, t)
    want = [
        theirs(variant)(*(x if d is None else x.select(d, i) for x, d in zip((s, t), in_dims, strict=True))) for i in range(4)
    ]
    same(mapped, torch.stack(want))


@pytest.mark.contract("`torch.vmap`: any in_dims and out_dims")
@variants
@backends
def test_vmap_out_dims(backend: str, variant: str) -> None:
    """A value a row, the mapped dimension put anywhere; a map of a map; in chunks."""
    s, t = pair((4, 2, 3, 5), grad=False)
    f = ours(variant, backend, reduction="none")
    want = torch.stack([theirs(variant, reduction="none")(a, b) for a, b in zip(s, t, strict=True)])
    for out in (0, 1, 2, -1):
        same(torch.vmap(f, out_dims=out)(s, t), want.movedim(0, out))
    same(torch.vmap(f, chunk_size=3)(s, t), want)
    if "kd" not in variant:  # the mapped function has its own targets
        same(torch.vmap(torch.vmap(f), in_dims=(0, 0), out_dims=1)(s, t), want.movedim(0, 1))


@pytest.mark.contract("per-sample gradients: vmap over grad")
@variants
@backends
def test_vmap_over_grad_gives_per_sample_gradients(backend: str, variant: str) -> None:
    s, t = pair((4, 3, 5), grad=False)
    per_sample = torch.vmap(torch.func.grad(ours(variant, backend)))(s, t)
    want = torch.stack([torch.func.grad(theirs(variant))(a, b) for a, b in zip(s, t, strict=True)])
    same(per_sample, want)
    same(torch.func.grad(lambda x: torch.vmap(ours(variant, backend))(x, t).sum())(s), want)
    x = s.clone().requires_grad_()
    torch.vmap(ours(variant, backend))(x, t).sum().backward()
    same(x.grad, want)


@variants
@backends
def test_batched_gradients(backend: str, variant: str) -> None:
    """is_grads_batched: vmap over the backward alone."""
    s, t = pair(grad=True)
    for reduction, sides in itertools.product(("none", "sum"), ((s, t), (s,))):
        options = {"reduction": reduction}

        def batched(f: Callable[[Tensor, Tensor], Tensor], sides: tuple[Tensor, ...] = sides) -> tuple[Tensor, ...]:
            value = f(s, t if len(sides) > 1 else t.detach())
            ups = torch.randn(4, *value.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
            return torch.autograd.grad(value, sides, ups, is_grads_batched=True)

        want = batched(theirs(variant, **options))
        same(batched(ours(variant, backend, **options)), want)


# ---------------------------------------------------------------------------------------------- compile, checkpoint,
# autocast


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


@pytest.mark.contract("`torch.compile(fullgraph=True)`, aot_eager: static and dynamic shapes")
@pytest.mark.parametrize("reduction, grads", [("mean", "s"), ("none", "st")])  # written during the forward, recomputed
@pytest.mark.parametrize("variant", ["kl", "kl-inf", "mse-center", "huber", "kd", "kd-mse"])
@backends
def test_compile_aot_eager(backend: str, variant: str, reduction: str, grads: str) -> None:
    """No graph break, and the same numbers; a second shape must not change that (dynamic shapes)."""
    torch._dynamo.reset()
    f = ours(variant, backend, reduction=reduction, row_weight=None)
    compiled = torch.compile(lambda s, t: f(s * 2, t), fullgraph=True, backend="aot_eager", dynamic=None)
    for shape in ((4, 7), (6, 9)):
        results = []
        for g in (compiled, lambda s, t: f(s * 2, t)):
            s, t = pair(shape)
            t.requires_grad_("t" in grads)
            value = g(s, t)
            value.square().sum().backward()
            results.append([value.detach(), s.grad] + ([t.grad] if "t" in grads else []))
        same(*results, rtol=1e-15)


def test_compile_double_backward_is_right_or_refused() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours("kl"), fullgraph=True, backend="aot_eager")
    s, t = pair()

    def second(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        (g,) = torch.autograd.grad(f(s, t), s, create_graph=True)
        return torch.autograd.grad(g.square().sum(), s)[0]

    want = second(theirs("kl"))
    try:
        got = second(compiled)
    except RuntimeError:
        return
    same(got, want)


def test_compile_of_func_grad() -> None:
    torch._dynamo.reset()
    s, t = pair(grad=False)
    for transform in ("grad", "jvp"):
        compiled = torch.compile(
            lambda a, b, tr=transform: TRANSFORMS[tr](ours("kl"), a, b), fullgraph=True, backend="aot_eager"
        )
        same(compiled(s, t), TRANSFORMS[transform](theirs("kl"), s, t))


@pytest.mark.contract("`torch.utils.checkpoint`")
@pytest.mark.parametrize("use_reentrant", [False, True])
@variants
@backends
def test_checkpoint(backend: str, variant: str, use_reentrant: bool) -> None:
    s, t = pair()
    value = checkpoint(ours(variant, backend), s, t, use_reentrant=use_reentrant)
    value.backward()
    same((s.grad, t.grad), torch.autograd.grad(theirs(variant)(s, t), (s, t)))


@pytest.mark.parametrize("change", ["profiler", "mode", "threads"])
def test_a_checkpoint_whose_two_passes_differ(objective: Objective, change: str) -> None:
    """What one way through the package saves, the other may restore: a profiler, a mode or another number of threads decides
    which is taken."""
    s, t = (torch.randn(512, 128, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    s.requires_grad_()
    want = torch.autograd.grad(objective(s, t), s)[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        value = checkpoint(lambda x: objective(x * 1, t), s, use_reentrant=False)
        if change == "threads":
            torch.set_num_threads(2)
        watching: dict[str, Any] = {"profiler": torch.autograd.profiler.profile(), "mode": FlopCounterMode(display=False)}
        with watching.get(change, contextlib.nullcontext()):
            got = torch.autograd.grad(value, s)[0]
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_saved_tensors_are_not_changed_where_hooks_keep_them(objective: Objective) -> None:
    """A store may give one tensor to two who saved equal ones, or one that may not be written."""
    s, t = pair((4, 7))
    store: dict[tuple[Any, ...], Tensor] = {}

    def pack(x: Tensor) -> tuple[Any, ...]:
        key = (x.shape, x.dtype, x.detach().numpy().tobytes())
        store.setdefault(key, x.detach().clone())
        return key

    with saved_tensors_hooks(pack, store.__getitem__):
        value = 3 * objective(s, t) + 5 * objective(s, t)
    before = {key: x.clone() for key, x in store.items()}
    same(torch.autograd.grad(value, (s, t)), tuple(8 * x for x in torch.autograd.grad(objective(s, t), (s, t))))
    assert store and all(torch.equal(x, before[key]) for key, x in store.items())


@reductions
def test_vmap_of_a_backward_pass(objective: Objective, reduction: str) -> None:
    """Many incoming gradients at once to one loss that has been computed before."""
    s, t = pair((3, 5))
    value = objective(s, t, reduction=reduction)
    up = torch.randn(4, *value.shape, dtype=F64)
    want = [torch.autograd.grad(value, (s, t), each, retain_graph=True) for each in up]
    got = torch.vmap(lambda each: torch.autograd.grad(value, (s, t), each))(up)
    same(got, tuple(torch.stack(of_side) for of_side in zip(*want, strict=True)))


@pytest.mark.contract("autocast: bfloat16, float16")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@backends
def test_autocast_takes_the_logits_as_they_are(objective: Objective, dtype: torch.dtype, backend: str) -> None:
    """No cast, up or down, happens on the way in; the loss stays float32 and bit-equal to the call outside."""
    for kinds in ((F32, F32), (dtype, dtype), (F32, dtype)):
        s, t = logits("typical", (6, 35), kinds)
        results = []
        for enabled in (True, False):
            x = s.clone().requires_grad_()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                value = objective(x, t, backend=backend)
            value.backward()
            results.append((value.detach(), x.grad))
        (a, ga), (b, gb) = results
        assert a.dtype == F32 and ga is not None and ga.dtype == kinds[0]
        assert torch.equal(a, b) and torch.equal(ga, gb) and b > 0
        truth = objective.oracle(s, t)
        check_loss(a, truth, (s, t))
        check_grad(ga, truth.student, s, (s, t))


def test_autocast_with_a_linear_head() -> None:
    """The usual AMP step: a bf16 student from autocast, an fp32 teacher; the gradient reaches the fp32 weight."""
    weight = torch.linspace(-1, 1, 4 * 32).reshape(32, 4).requires_grad_()
    x, t = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), pair((8, 32), grad=False, dtype=F32)[1]
    with torch.autocast("cpu", dtype=BF16):
        out = torch.nn.functional.linear(x, weight)
        value = kdfast.kl_div_tau(out, t, tau=4.0)
    assert out.dtype == BF16 and value.dtype == F32
    check_loss(value.detach(), oracle("kl_div_tau", out, t, 4.0), (out, t))
    value.backward()
    assert weight.grad is not None and weight.grad.dtype == F32 and weight.grad.abs().max() > 0


@pytest.mark.contract("`torch.use_deterministic_algorithms`")
@backends
def test_deterministic_algorithms_mode(loss: str, backend: str) -> None:
    s, t = pair(dtype=F32)
    torch.use_deterministic_algorithms(True)
    try:
        for sides in ((s,), (s, t)):
            gradients = torch.autograd.grad(loss_of(loss)(s, t, backend=backend), sides)
            check_grad(gradients[0], oracle(loss, s, t).student, s, (s, t))
    finally:
        torch.use_deterministic_algorithms(False)


def test_hooks_and_anomaly_mode() -> None:
    s, t = pair(dtype=F64)
    calls = []
    s.register_hook(lambda g: calls.append(g.clone()))
    with torch.autograd.detect_anomaly(check_nan=True):
        kdfast.kl_div_tau(s, t).backward()
    same(calls[0], torch.autograd.grad(theirs("kl", tau=1.0)(s, t), s)[0])


# -------------------------------------------------------------------------------------------------------------------
# opcheck


OPERATORS = operators.registered("kdfast")


def test_operators_are_found() -> None:
    assert all(any(loss in n for n in OPERATORS) for loss in ("kl_div_tau", "logit_mse", "logit_huber", "kd_loss")), OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, kernel: Where) -> None:
    operators.opcheck(name, kernel)


def test_operators_do_not_drop_a_gradient_in_silence() -> None:
    """A private operator called directly on tensors that require grad: torch warns (or raises) when its derivative is
    asked for."""
    s, t = pair((4, 7), dtype=F32)
    for name in ("kl_div_tau_forward", "logit_mse_forward", "logit_huber_forward"):
        operator = getattr(torch.ops.kdfast, name).default
        value = operator(s, t, *next(operators.samples(name, Where("cpu", "cpp")))[2:])[0]
        assert value.requires_grad
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            value.sum().backward()


def test_private_torch_names_that_the_guard_uses() -> None:
    """Dispatch between kernels and reference.py rests on these two; a torch that changes their meaning must fail here, not
    silently."""
    assert torch._C._are_functorch_transforms_active() is False
    assert torch.func.vmap(lambda x: x + torch._C._are_functorch_transforms_active())(torch.zeros(2)).tolist() == [1, 1]
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:FutureWarning")
def test_private_torch_names_that_short_cuts_use() -> None:
    """Whether anybody sees the operators that are called; whether a saved gradient may be overwritten; whose memory is shared."""
    x = torch.ones(4, requires_grad=True)

    class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **kwargs or {})

    class Function(torch.overrides.TorchFunctionMode):
        pass

    assert not _ops._watched()
    for watcher in (Dispatch(), Function(), torch.profiler.profile()):
        with watcher:
            assert _ops._watched()
    seen = []
    torch.jit.trace(lambda y: (seen.append(_ops._watched()), y + 1)[1], (torch.ones(2),), check_trace=False)
    assert seen == [True] and not _ops._watched()

    kept = []
    y = x * 1
    y.register_hook(lambda grad: kept.append((_ops._graph_is_kept(), _ops._is_batched(grad))))
    y.sum().backward(retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(4), is_grads_batched=True, retain_graph=True)
    y.sum().backward()
    assert kept == [(True, False), (True, True), (False, False)]

    assert torch._C._is_alias_of(x, x[1:]) and not torch._C._is_alias_of(x, x.clone())


def test_kernels_serve_plain_calls() -> None:
    """The transforms' detour through reference.py must not swallow the ordinary case: the profiler sees our operators
    there."""
    s, t = pair((4, 7), dtype=F32)
    for loss in ("kl_div_tau", "logit_mse", "logit_huber"):
        for sides, reduction in (((s,), "mean"), ((s, t), "none")):
            with torch.profiler.profile() as profile:
                torch.autograd.grad(loss_of(loss)(s, t, reduction=reduction).sum(), sides)
            names = {e.name for e in profile.events()}
            assert any(n.startswith(f"kdfast::{loss}") for n in names), (loss, reduction, sorted(names))
            assert not any("softmax" in n for n in names)
