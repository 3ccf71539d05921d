"""Random calls of the public functions, right and wrong, and what each must do: one generator for hypothesis and for the fuzz run.

* ``draw`` makes a ``Problem`` of a random generator's choices (``random.Random``, or hypothesis's own): a legal call, drawn in full
  before anything is computed.  ``spoilt`` replaces arguments of it by others, most of them wrong.
* ``faults`` says which arguments of a call are wrong, by what the documentation says and nothing else.
* ``judge`` makes the call: a ValueError or TypeError that names a wrong argument, or, where there is none, the value, the gradients
  and the parts of the oracle; and no input is written but what ``inplace_backward`` says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import itertools
import math
import numbers
import random
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    Result,
    Truth,
    arithmetic,
    as_output,
    check_loss,
    compare,
    eager_errors,
    oracle,
    to_numpy,
)
from torch import Tensor

import kdfast

LOSSES = ("kl_div_tau", "logit_mse", "logit_huber", "kd_loss")
REDUCTIONS = ("none", "sum", "mean", "batchmean")
WIDTHS = (63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1003)
LAYOUTS = ("plain", "plain", "slice", "transpose", "reverse-lead", "class-first", "every-other", "negated")
SHARED = ("reduction", "row_weight", "denominator", "num_classes", "inplace_backward", "backend")
OWN = {
    "kl_div_tau": ("tau", "teacher_tau", "scale_by_tau_squared"),
    "logit_mse": ("center",),
    "logit_huber": ("delta", "kind", "center"),
    "kd_loss": ("target", "tau", "alpha", "soft", "ignore_index", "label_smoothing", "return_parts"),
}
ARGUMENTS = {loss: ("student_logits", "teacher_logits", *own, *SHARED) for loss, own in OWN.items()}
FLOATS = (F64, F32, BF16, F16)


# ------------------------------------------------------------------------------------------------------------------
# drawing


@dataclass
class Problem:
    """A legal call but for its logits, which ``build`` computes of the other fields."""

    loss: str
    shape: tuple[int, ...]
    teacher_width: int
    dtypes: tuple[torch.dtype, torch.dtype]
    spread: float
    noise: float
    shift: float
    seed: int
    layouts: tuple[str, str]
    grads: str
    leaf: bool
    masked: str
    grad_output: float
    mode: str  # "", "no_grad", "inference", or "inference_teacher": the teacher's logits come from torch.inference_mode()
    options: dict[str, Any] = field(default_factory=dict)


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _lead(rng: random.Random) -> tuple[int, ...]:
    kind = rng.choice(["few", "few", "few", "few", "many", "none", "one"])
    if kind == "many":
        return tuple(rng.choice([1, 2, 2]) for _ in range(rng.randint(4, 8)))
    lead = [rng.randint(1, 5) for _ in range(1 if kind == "one" else rng.randint(1, 3))]
    if kind == "none":
        lead[rng.randrange(len(lead))] = 0
    return tuple(lead)


def _tau(rng: random.Random) -> Any:
    return rng.choice(
        [
            INF,
            1,
            4.0,
            fractions.Fraction(7, 2),
            np.float32(0.3),
            _log_uniform(rng, 0.05, 1e6),
            _log_uniform(rng, 0.05, 1e6),
            _log_uniform(rng, 0.3, 30),
            _log_uniform(rng, 1e-15, 1e15),
        ]
    )


def _row_weight(rng: random.Random, lead: tuple[int, ...]) -> Tensor:
    kind = rng.choice(["bool", "float", "zero", "strided"])
    w = torch.from_numpy(np.random.default_rng(rng.randint(0, 99)).integers(0, 4, lead) / 2.0)
    if kind == "bool":
        return w > 0.7
    if kind == "zero":
        return w * 0
    w = w.to(rng.choice(FLOATS))
    return torch.stack([w, -w], -1)[..., 0] if kind == "strided" else w


def draw(rng: random.Random, losses: tuple[str, ...] = LOSSES) -> Problem:
    """A legal call."""
    loss = rng.choice(losses)
    lead = _lead(rng)
    k = rng.choice([rng.randint(1, 40), rng.randint(1, 40), rng.choice(WIDTHS)])
    if math.prod(lead) * k > 20000:
        k = k % 100 + 1
    backend = rng.choice(["auto", "cpp", "cpp", "cpp", "reference"])
    options: dict[str, Any] = {"reduction": rng.choice(REDUCTIONS), "backend": backend}
    if loss in ("kl_div_tau", "kd_loss"):
        options["tau"] = _tau(rng)
    if loss == "kl_div_tau" and options["tau"] < INF and rng.random() < 0.5:
        options["teacher_tau"] = rng.choice([_log_uniform(rng, 0.3, 1e3), float(options["tau"])])
    if loss == "kl_div_tau" and options["tau"] < INF and rng.random() < 0.5:
        options["scale_by_tau_squared"] = False
    if loss in ("logit_mse", "logit_huber") and rng.random() < 0.7:
        options["center"] = rng.random() < 0.5
    if loss == "logit_huber":
        options["delta"] = rng.choice([0.01, 1, 30.0, _log_uniform(rng, 1e-6, 1e6)])
        options["kind"] = rng.choice(["pseudo", "smooth_l1"])
    widths = [k, k]
    if rng.random() < 0.4:
        options["num_classes"] = rng.randint(1, k)
        if rng.random() < 0.5:  # padded to different widths
            widths[rng.randrange(2)] += rng.randint(1, 9)
    if options["reduction"] != "none" and rng.random() < 0.4:
        options["denominator"] = rng.choice(
            [
                3,
                0.37,
                fractions.Fraction(5, 3),
                _log_uniform(rng, 1e-3, 1e6),
                torch.tensor(5),
                torch.tensor(2, dtype=torch.int32),
            ]
            + [torch.tensor(1.7, dtype=dtype) for dtype in FLOATS]
        )
    if rng.random() < 0.5:
        options["row_weight"] = _row_weight(rng, lead)
    if loss == "kd_loss":
        options |= _hard_options(rng, lead, options.get("num_classes", k))
    noise = rng.choice([0.0, 1e-4, 1.0, 10.0])
    layouts = [rng.choice((*LAYOUTS, "expand", "windows")) for _ in range(2)]
    problem = Problem(
        loss,
        (*lead, widths[0]),
        widths[1],
        (rng.choice(FLOATS), rng.choice(FLOATS)),
        spread=rng.choice([0.1, 3.0, 3.0, 3.0, 15.0, 1e4]),
        noise=noise,
        shift=rng.choice([0.0, 0.0, 5.0]) if noise >= 1 else 0.0,  # with both, test_accuracy.py's "a constant"
        seed=rng.randint(0, 9999),
        layouts=(layouts[0], layouts[1]),
        grads=rng.choice(["s", "s", "t", "st", "st", ""]),
        leaf=rng.random() < 0.5,
        masked="no" if "windows" in layouts else rng.choice(["no", "no", "both", "teacher", "student", "nan"]),
        grad_output=rng.choice([1.0, 0.25, -3.0]),
        mode=rng.choice(["", "", "", "", "", "no_grad", "inference", "inference_teacher"]),
        options=options,
    )
    if problem.spread > 100:
        # The mean of (s - t) / tau is then huge, and what is left of it is not resolved, by eager neither but where it is lucky.
        options.pop("teacher_tau", None)
    if 1e10 <= options.get("tau", 1) < INF:
        problem.masked = (
            "no"  # README, limits: computed as tau = inf, which is infinite where the teacher alone has a class at -inf
        )
    if problem.masked == "teacher":
        problem.noise = max(problem.noise, 1.0)  # else its gradient is 0, the sum of equal numbers of both signs
    if rng.random() < 0.3:
        _in_place(rng, problem)
    return problem


def _hard_options(rng: random.Random, lead: tuple[int, ...], k: int) -> dict[str, Any]:
    y = np.random.default_rng(rng.randint(0, 99)).integers(0, k, lead)
    options: dict[str, Any] = {"alpha": rng.choice([0, 1, 0.9, 0.5, rng.random()])}
    ignored = rng.choice([None, -100, -1, 0, 10**12])
    if ignored is not None:
        y = np.where(np.random.default_rng(rng.randint(0, 99)).random(lead) < rng.choice([0.3, 1.0]), ignored, y)
        options["ignore_index"] = ignored
    target = torch.from_numpy(np.asarray(y))
    if ignored != 10**12 and rng.random() < 0.3:
        target = target.int()
    if rng.random() < 0.3:
        target = torch.stack([target, target + 1], -1)[..., 0]
    options["target"] = target
    if rng.random() < 0.5:
        options["soft"] = rng.choice(["kl", "mse"])
    if rng.random() < 0.5:
        options["label_smoothing"] = rng.choice([0, 0.1, 1, rng.random()])
    if rng.random() < 0.3:
        options["return_parts"] = True
    return options


def _in_place(rng: random.Random, p: Problem) -> None:
    """What inplace_backward takes: logits that are no leaf, of a class dimension of stride 1 and few dimensions, and a kernel."""
    p.options["inplace_backward"] = True
    p.options["backend"] = "cpp"
    p.leaf = False
    p.grads = rng.choice(["s", "st"])
    p.shape = (*p.shape[:-1], p.shape[-1])
    p.layouts = (rng.choice(["plain", "slice", "transpose", "reverse-lead"] if len(p.shape) < 7 else ["plain"]), p.layouts[1])
    if p.loss == "kd_loss" and F64 in p.dtypes:
        p.dtypes = (F64, p.dtypes[1])


# ------------------------------------------------------------------------------------------------------------------
# building


def arranged(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` in another memory layout: a view of a larger or a permuted base.  ("expand" and "windows", in which
    elements share memory, have only some of the values.)"""
    if layout == "slice":
        base = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), 7.0, dtype=x.dtype)
        view = base[..., 0:-1, 1:-2]
        view.copy_(x)
        return view
    if layout == "transpose" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reverse-lead":
        dims = (*reversed(range(x.dim() - 1)), x.dim() - 1)
        return x.permute(dims).contiguous().permute(dims)
    if layout == "class-first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "every-other":
        base = torch.full([2 * n for n in x.shape[:-1]] + [x.shape[-1]], 7.0, dtype=x.dtype)
        view = base[tuple(slice(None, None, 2) for _ in x.shape[:-1])]
        view.copy_(x)
        return view
    if layout == "negated":  # torch's lazy minus, as of x.conj().imag
        return torch._neg_view(-x)
    if layout == "expand" and x.numel():
        return x[:1].clone().expand(x.shape)
    if layout == "windows" and x.numel():
        rows, k = math.prod(x.shape[:-1]), x.shape[-1]
        flat = x.reshape(-1)[: k + rows - 1].clone() if x.numel() >= k + rows - 1 else x.new_zeros(k + rows - 1)
        strides = [math.prod(x.shape[i + 1 : -1]) for i in range(x.dim() - 1)]
        return flat.as_strided(x.shape, (*strides, 1))
    return x


def _values(p: Problem) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(p.seed)
    lead, k = p.shape[:-1], p.options.get("num_classes", p.shape[-1])
    width = max(p.shape[-1], p.teacher_width)
    t = torch.from_numpy(rng.standard_normal((*lead, width)) * p.spread).to(p.dtypes[1])
    s = (t.to(F64) + torch.from_numpy(rng.standard_normal((*lead, width)) * p.noise) + p.shift).to(p.dtypes[0])
    off = torch.from_numpy(rng.random(s.shape) < 0.2)
    off[..., rng.integers(0, k)] = False  # no row is left without a class
    if p.masked in ("both", "teacher"):
        t[off] = -INF
    if p.masked in ("both", "student"):
        s[off & torch.from_numpy(rng.random(s.shape) < 0.3) if p.masked == "student" else off] = -INF
    if p.masked == "nan":
        s[torch.from_numpy(rng.random(s.shape) < 0.02)] = math.nan
    if not {"expand", "windows"} & set(p.layouts):  # there, a value is in more than one row
        if "row_weight" in p.options:
            s[p.options["row_weight"] == 0] = math.nan  # must not matter
        s[..., k:] = t[..., k:] = math.nan
    return s[..., : p.shape[-1]].contiguous(), t[..., : p.teacher_width].contiguous()


def build(p: Problem) -> dict[str, Any]:
    """The arguments of the call."""
    s, t = (arranged(x, layout) for x, layout in zip(_values(p), p.layouts, strict=True))
    if p.mode == "inference_teacher":
        with torch.inference_mode():
            t = t.clone()
    arguments = {"student_logits": s, "teacher_logits": t} | p.options
    for name, letter in (("student_logits", "s"), ("teacher_logits", "t")):
        x = arguments[name]
        if letter in p.grads and not x.is_inference():
            x.requires_grad_()
            arguments[name] = x if p.leaf else as_output(x)
    return arguments


# ------------------------------------------------------------------------------------------------------------------
# wrong arguments

NAN = math.nan
ANYTHING: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2.5, -0.0, NAN, INF, -INF, 1e-300, 1e300, 10**400, -(10**400), 2**63, -(2**63), 1j, "4", "", b"mean",
    [], [1.0], (2,), {}, object(), len, float, np.float32(2), np.int64(3), np.float64(NAN), np.ones(3), np.array(["none", "kl"]),
    fractions.Fraction(1, 3), torch.float32,
]  # fmt: skip


def _tensor(rng: random.Random, p: Problem) -> Tensor:
    """A tensor of a right or a wrong shape, dtype, device and kind."""
    lead, k = p.shape[:-1], p.shape[-1]
    shape = rng.choice(
        [
            p.shape,
            p.shape,
            lead,
            lead,
            (),
            (1,),
            (k,),
            (*lead, k + 1),
            (*lead, 0),
            (*lead, 1),
            (1, *p.shape),
            (lead[0] + 1, *p.shape[1:]),
        ]
    )
    dtypes = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    dense = torch.ones(shape)
    makers = [
        lambda: dense.to(rng.choice(dtypes)),
        lambda: dense.to(rng.choice(dtypes)),
        lambda: dense.to(rng.choice(dtypes)),
        lambda: dense.clone().requires_grad_(),
        lambda: dense.to("meta", rng.choice(dtypes)),
        lambda: dense.to(rng.choice(dtypes[:6])).to_sparse(),
        lambda: torch.ones(lead[0], k).to_mkldnn(),
        lambda: torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2, k), torch.ones(3, k)]),
        lambda: torch.nested.nested_tensor([torch.ones(2, k), torch.ones(3, k)], layout=torch.jagged),
        lambda: torch.nn.Parameter(dense.clone()),
    ]
    return rng.choice(makers)()


def _wrong_target(rng: random.Random, p: Problem) -> Tensor:
    k = p.options.get("num_classes", p.shape[-1])
    target = p.options["target"].clone()
    if target.numel():
        target.view(-1)[rng.randrange(target.numel())] = rng.choice([k, -1, -100, 2**31 - 1, -(2**31), p.shape[-1] - 1])
    return target


def spoilt(rng: random.Random, p: Problem, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with one or two replaced, most often by wrong ones."""
    arguments, same = dict(arguments), arguments["student_logits"].detach()  # another tensor on its memory
    choices = {
        "reduction": ["avg", "Mean", *REDUCTIONS],
        "backend": ["triton", "cuda", "cpp", "reference"],
        "num_classes": [p.shape[-1], p.shape[-1] + 1, p.teacher_width],
    }
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice((*ARGUMENTS[p.loss], "temperature"))
        tensors = {"student_logits": 1.0, "teacher_logits": 1.0, "row_weight": 0.7, "target": 0.7, "denominator": 0.7}
        if rng.random() < tensors.get(name, 0.15):
            value = _tensor(rng, p)
        else:
            value = rng.choice([*ANYTHING, *choices.get(name, ["pseudo", "kl", "mse", "huber"])])
        if name == "target" and rng.random() < 0.4:
            value = _wrong_target(rng, p)
        if name == "inplace_backward" and rng.random() < 0.7:
            value = True
        if name == "student_logits" and rng.random() < 0.2:
            name, value = "teacher_logits", same
        arguments[name] = value
    return arguments


# ------------------------------------------------------------------------------------------------------------------
# what is legal, by the documentation (README, docstrings)


def _dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested and not x.is_quantized


def _is_number(x: Any, low: float, high: float) -> bool:
    return not isinstance(x, (bool, Tensor)) and isinstance(x, numbers.Real) and bool(low <= x <= high)


def _is_int(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def faults(loss: str, arguments: dict[str, Any]) -> set[str]:
    """The names of the wrong arguments; empty where the call is legal."""
    unknown = set(arguments) - set(ARGUMENTS[loss])
    if unknown:
        return unknown
    s, t = arguments["student_logits"], arguments["teacher_logits"]
    sides = {"student_logits": s, "teacher_logits": t}
    wrong = {
        name for name, x in sides.items() if not (_dense(x) and x.dtype in FLOATS and x.dim() >= 2 and x.shape[-1] >= 1)
    }  # fmt: skip
    wrong |= _faults_of_own(loss, arguments)
    reduction = arguments.get("reduction", "mean")
    if not (isinstance(reduction, str) and reduction in REDUCTIONS):
        wrong.add("reduction")
    backend = arguments.get("backend", "auto")
    if not (isinstance(backend, str) and backend in ("auto", "cpp", "triton", "reference")):
        wrong.add("backend")
    if not isinstance(arguments.get("inplace_backward", False), bool):
        wrong.add("inplace_backward")
    denominator = arguments.get("denominator")
    if denominator is not None:
        if isinstance(denominator, Tensor):
            kinds = (*FLOATS, torch.int64, torch.int32)
            right = (
                _dense(denominator) and denominator.dim() == 0 and denominator.dtype in kinds and not denominator.requires_grad
            )
        else:
            right = _is_number(denominator, 1e-30, 1e30)
        if not right or ("reduction" not in wrong and reduction == "none"):
            wrong.add("denominator")
    weight = arguments.get("row_weight")
    if weight is not None and not (_dense(weight) and weight.dtype in (*FLOATS, torch.bool) and not weight.requires_grad):
        wrong.add("row_weight")
    num_classes = arguments.get("num_classes")
    if num_classes is not None and not _is_int(num_classes):
        wrong.add("num_classes")
    return wrong | _faults_together(loss, arguments, wrong)


def _faults_of_own(loss: str, arguments: dict[str, Any]) -> set[str]:
    """Wrong by themselves, of the arguments that are not every loss's."""
    limits = {
        "tau": (1e-15, 1e15),
        "teacher_tau": (1e-15, 1e15),
        "delta": (1e-15, 1e15),
        "alpha": (0, 1),
        "label_smoothing": (0, 1),
    }
    choices = {"kind": ("pseudo", "smooth_l1"), "soft": ("kl", "mse")}
    wrong = set()
    flags = ("center", "scale_by_tau_squared", "return_parts")
    for name, value in arguments.items():
        if name in limits:
            infinite = name in ("tau", "teacher_tau") and _is_number(value, INF, INF)
            right = infinite or _is_number(value, *limits[name]) or (name == "teacher_tau" and value is None)
        elif name in choices:
            right = isinstance(value, str) and value in choices[name]
        elif name == "ignore_index":
            right = _is_int(value) and -(2**63) <= value < 2**63
        else:
            right = name not in flags or isinstance(value, bool)
        if not right:
            wrong.add(name)
    if loss == "kl_div_tau" and not wrong:
        tau = arguments.get("tau", 1.0)
        teacher_tau = tau if arguments.get("teacher_tau") is None else arguments["teacher_tau"]
        if INF in (tau, teacher_tau) and tau != teacher_tau:
            wrong |= {"tau", "teacher_tau"}
        if tau == INF and not arguments.get("scale_by_tau_squared", True):
            wrong |= {"tau", "scale_by_tau_squared"}
    if loss == "kd_loss":
        target = arguments.get("target")
        if not (_dense(target) and target.dtype in (torch.int64, torch.int32)):
            wrong.add("target")
    return wrong


def _faults_together(loss: str, arguments: dict[str, Any], alone: set[str]) -> set[str]:
    """Of arguments that are right by themselves, those that do not go with each other."""
    if alone & {"student_logits", "teacher_logits"}:
        return set()
    s, t = arguments["student_logits"], arguments["teacher_logits"]
    given = {name: x for name, x in arguments.items() if name not in alone and x is not None}
    wrong = set()
    if s.shape[:-1] != t.shape[:-1] or s.device != t.device:
        wrong |= {"student_logits", "teacher_logits"}
    if "num_classes" in given:
        if not 1 <= given["num_classes"] <= min(s.shape[-1], t.shape[-1]):
            wrong.add("num_classes")
    elif s.shape[-1] != t.shape[-1]:
        wrong |= {"student_logits", "teacher_logits", "num_classes"}
    for name in {"row_weight", "target"} & set(given):
        if given[name].shape != s.shape[:-1] or given[name].device != s.device:
            wrong.add(name)
    denominator = given.get("denominator")
    if isinstance(denominator, Tensor) and denominator.device != s.device:
        wrong.add("denominator")
    if given.get("backend") == "triton" and (s.device.type != "meta" or loss == "kd_loss"):
        wrong.add("backend")
    if given.get("inplace_backward", False) and _faults_in_place(loss, s, t, given.get("backend", "auto")):
        wrong.add("inplace_backward")
    if loss == "kd_loss" and s.device.type == "cpu" and not (alone | wrong):
        target, classes = given["target"], given.get("num_classes", s.shape[-1])
        seen = target != given.get("ignore_index", -100)
        if "row_weight" in given:
            seen &= given["row_weight"] != 0
        if (seen & ((target < 0) | (target >= classes))).any():
            wrong.add("target")
    return wrong


def _faults_in_place(loss: str, s: Tensor, t: Tensor, backend: str) -> bool:
    mixed = loss == "kd_loss" and s.dtype != F64 and t.dtype == F64
    if backend == "reference" or mixed or s.is_neg() or (s.requires_grad and s.is_leaf) or s.stride(-1) != 1:
        return True
    if s.device.type == "meta" or not s.numel():
        return len(s.shape) > 7
    # Every element of the student has a place of its own, and none of the teacher's is among them.
    places = torch.arange(s.untyped_storage().nbytes() // s.element_size()).as_strided(s.shape, s.stride(), s.storage_offset())
    if len(places.unique()) < places.numel():
        return True
    shared = s.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
    return shared or _independent_strides(s) > 6


def _independent_strides(x: Tensor) -> int:
    """How many loops over the rows the layout takes."""
    dims = [(n, stride) for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    return sum(1 for (_, outer), (n, inner) in itertools.pairwise(dims) if outer != n * inner) + bool(dims)


# ------------------------------------------------------------------------------------------------------------------
# judging


def _memory(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The bytes under every tensor, those around a view included."""
    kept = {}
    for name, x in arguments.items():
        if _dense(x) and x.device.type == "cpu":
            kept[name] = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()
    return kept


def _check_unwritten(arguments: dict[str, Any], before: dict[str, Tensor]) -> None:
    for name, was in before.items():
        now = torch.empty(0, dtype=torch.uint8).set_(arguments[name].untyped_storage())
        assert torch.equal(was, now), f"{name} was written"


def _legal_but_not_judged(arguments: dict[str, Any]) -> bool:
    """What only has to run: meta tensors, which have no values; divisors of 0, negative or not finite, which the documentation leaves
    to whoever passes them."""
    if arguments["student_logits"].device.type == "meta":
        return True
    denominator = arguments.get("denominator")
    return isinstance(denominator, Tensor) and not 0 < float(denominator) < INF


def _moved(x: Any, device: str) -> Any:
    """A tensor in the same layout on another device."""
    if not isinstance(x, Tensor):
        return x
    plain = x.detach().resolve_neg()
    place = torch.empty(0, dtype=x.dtype, device=device).set_(
        plain.untyped_storage().to(device=torch.device(device)), plain.storage_offset(), plain.shape, plain.stride()
    )
    place.requires_grad_(x.requires_grad)
    return place if x.is_leaf else as_output(place)


def judge(
    loss: str, arguments: dict[str, Any], *, grad_output: float = 1.0, seed: int = 0, mode: str = "", device: str = "cpu"
) -> str:
    """Make the call and judge what comes of it: "right" or "refused". (On another device: legal calls.)"""
    wrong = faults(loss, arguments)
    before = _memory(arguments)
    on_device = arguments if device == "cpu" else {name: _moved(x, device) for name, x in arguments.items()}
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    call = getattr(kdfast, loss)
    refusal = None
    try:
        with modes.get(mode, contextlib.nullcontext)():
            value = call(**on_device)
    except (ValueError, TypeError) as error:
        refusal = error
    _check_unwritten(arguments, before)
    if refusal is not None:
        assert wrong, f"a legal call was refused: {type(refusal).__name__}: {refusal}"
        assert any(re.search(rf"\b{name}\b", str(refusal)) for name in wrong), f"{wrong} is wrong and not named: {refusal}"
        return "refused"
    assert not wrong, f"{wrong} is wrong and was not refused"
    parts: tuple[Tensor, ...] = value if isinstance(value, tuple) else (value,)
    assert (len(parts) == 3) == arguments.get("return_parts", False)
    s, t = on_device["student_logits"], on_device["teacher_logits"]
    tracked = mode not in modes
    sides = {letter: x for letter, x in (("s", s), ("t", t)) if x.requires_grad and tracked}
    assert parts[0].requires_grad == bool(sides) and not any(part.requires_grad for part in parts[1:])
    reduction = arguments.get("reduction", "batchmean" if loss == "kl_div_tau" else "mean")
    lead = s.shape[:-1]
    assert all(part.shape == (lead if reduction == "none" else ()) for part in parts)
    if _legal_but_not_judged(arguments):
        return "right"
    up: Any = grad_output
    if reduction == "none":
        up = grad_output * torch.tensor(np.random.default_rng(seed).integers(1, 5, lead) / 4.0)
    kept = {name: arguments[name].detach().clone() for name in ("student_logits", "teacher_logits")}  # for in place
    gradients = {}
    if sides:
        seed_of = torch.as_tensor(up, dtype=parts[0].dtype).expand(parts[0].shape).contiguous().to(device)
        found = torch.autograd.grad(parts[0], list(sides.values()), seed_of)
        gradients = dict(zip(sides, found, strict=True))
    if arguments.get("inplace_backward", False) and "s" in gradients:
        assert gradients["s"].data_ptr() == s.data_ptr() and gradients["s"].stride() == s.stride()
    if arguments.get("inplace_backward", False) and "s" in gradients and device == "cpu":  # there, and nowhere else
        now = torch.empty(0, dtype=s.dtype).set_(before["student_logits"].untyped_storage())
        now.as_strided(s.shape, s.stride(), s.storage_offset()).copy_(gradients["s"])
        gradients["s"] = gradients["s"].clone()
    _check_unwritten(arguments, before)
    parts, gradients = tuple(x.cpu() for x in parts), {side: x.cpu() for side, x in gradients.items()}
    _check_values(loss, arguments | kept, parts, gradients, up, reduction)
    return "right"


def _check_values(
    loss: str, arguments: dict[str, Any], parts: tuple[Tensor, ...], gradients: dict[str, Tensor], up: Any, reduction: str
) -> None:
    options = dict(arguments)
    s, t = options.pop("student_logits"), options.pop("teacher_logits")
    real = ("tau", "teacher_tau", "delta", "alpha", "label_smoothing", "denominator")  # any number, a fraction too
    options = {k: float(v) if k in real and isinstance(v, numbers.Real) else v for k, v in options.items()}
    truth = oracle(loss, s, t, grad_output=up, **options)
    used = [x[..., : options.get("num_classes")] for x in (s, t)]
    if all(x.isfinite().all() for x in used) and s.numel():
        assert not np.isnan(truth.loss).any() and not np.isnan(truth.student).any() and not np.isnan(truth.teacher).any()
    allow = _allowed(loss, s, t, truth, up, options)
    got = Result(parts[0].detach(), gradients.get("s"), gradients.get("t"))
    # A row of NaN: so is its gradient, but beside an infinite logit, and the teacher's of a KL, where it has no mass.
    spoilt_rows = np.zeros(s.shape[:-1], bool)
    finite = ~(s.isinf().any(-1) | t.isinf().any(-1)).numpy()
    for side, want in (("s", truth.student), ("t", truth.teacher)):
        rows = np.isnan(want).any(-1)
        spoilt_rows |= rows
        if side in gradients and (side == "s" or loss in ("logit_mse", "logit_huber")):
            g = to_numpy(gradients[side])[rows & finite]
            assert np.isnan(g).any(-1).all(), "no NaN in the gradient of a row of NaN"
    truth = dataclasses.replace(truth, unspecified=truth.unspecified | spoilt_rows)
    compare(
        got, truth, s, t, grads="".join(gradients), grad_output=up, reduction=reduction, allow=allow,
        in_forward=options.get("backend") != "reference",
    )  # fmt: skip
    for part, alpha in zip(parts[1:], (0.0, 1.0), strict=False):
        check_loss(part, oracle(loss, s, t, **(options | {"alpha": alpha})), (s, t), allow=allow[0])


def _allowed(loss: str, s: Tensor, t: Tensor, truth: Truth, up: Any, options: dict[str, Any]) -> tuple[float, ...]:
    """What a small batch may cost more than the budgets, computed, not guessed: it may hold nothing but rows that the arithmetic
    cannot resolve (a KL of 1e-30 at tau = 0.05, two classes whose differences cancel). There, twice the eager error is as good as the
    design asks for; and so is twice what the rounding of the exponents costs, which eager may escape by luck."""
    kind, used = arithmetic(s, t), options.get("num_classes")
    # To eager, a class at -inf is NaN; far below, it is the same to the oracle.
    low = [x[..., :used].to(kind).nan_to_num(nan=math.nan, posinf=INF, neginf=-1e30) for x in (s, t)]
    # Rows that are not judged, or whose weight is 0, to eager are 0 times NaN.
    row_weight = options.get("row_weight")
    judged = torch.from_numpy(~truth.unspecified & ~np.isnan(truth.student).any(-1) & ~np.isnan(truth.teacher).any(-1))
    if row_weight is not None:
        judged &= row_weight != 0
    low = [torch.where(judged.unsqueeze(-1), x, 0) for x in low]
    theirs: tuple[float, ...] = (0.0, 0.0, 0.0)
    with contextlib.suppress(RuntimeError, IndexError):  # IndexError: a target that is no class, in a row of weight 0
        theirs = eager_errors(loss, *low, oracle(loss, *low, grad_output=up, **options), grad_output=up, **options)
    theirs = tuple(2 * e if math.isfinite(e) else 0.0 for e in theirs)
    if loss == "kl_div_tau" or (loss == "kd_loss" and options.get("soft", "kl") == "kl"):
        tau = options.get("tau", 4.0 if loss == "kd_loss" else 1.0)
        exponents = np.maximum(_exponents(low[0], tau), _exponents(low[1], options.get("teacher_tau") or tau))
        eps = torch.finfo(kind).eps
        theirs = (
            theirs[0],
            max(theirs[1], eps * _weighted(exponents, truth.student[..., :used])),
            max(theirs[2], eps * _weighted(exponents, truth.teacher[..., :used])),
        )
    return theirs


def _exponents(logits: Tensor, tau: float) -> np.ndarray:
    """The sizes of a softmax's exponents, up to where the exponential underflows."""
    x = logits.double()
    return ((x.amax(-1, keepdim=True) - x) / tau).clamp(max=745).nan_to_num().numpy()


def _weighted(exponents: np.ndarray, gradient: np.ndarray) -> float:
    """The relative error (L2) of a gradient each of whose elements is off by its exponent, relative."""
    g = np.where(np.isfinite(gradient), gradient, 0)
    norm = np.sqrt((g * g).sum())
    return float(np.sqrt((g * g * exponents**2).sum()) / norm) if norm else 0.0
