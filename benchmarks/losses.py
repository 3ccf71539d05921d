"""What is measured: each loss with its inputs, its truth in float64, the bytes it has to move, and who computes it.

A provider computes the loss from the same inputs as everybody else, by the call that its documentation gives. Those that
fuse the last linear layer with the loss never see logits: they are compared on ``linear_kl``, which begins at the hidden
states, with others that multiply by PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

from .accuracy import MSE, oracle

ALPHA, DELTA = 0.9, 1.0
HIDDEN = 128  # hidden states of linear_kl

Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensor]  # of a loss's inputs
Maker = Callable[[float], Call]  # of the temperature

# ------------------------------------------------------------------------------------------------------ inputs


def logits(rows: int, classes: int, dtype: torch.dtype) -> Tensors:
    """A student's and a teacher's logits: standard deviation 3, the student one away from the teacher."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, classes, generator=generator).mul_(3)
    student = torch.randn(rows, classes, generator=generator).add_(teacher)
    return student.to(dtype), teacher.to(dtype)


def labelled_logits(rows: int, classes: int, dtype: torch.dtype) -> Tensors:
    """The same, and a label for each row."""
    return *logits(rows, classes, dtype), torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))


def hidden_states(rows: int, classes: int, dtype: torch.dtype) -> Tensors:
    """Hidden states and last weight of a student, and of a teacher, whose logits are like those above."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator).mul_(3**0.5) for n in (rows, classes))
    weight.mul_(HIDDEN**-0.5)
    noise = torch.randn(rows, HIDDEN, generator=generator).div_(3**0.5)
    return (hidden + noise).to(dtype), weight.to(dtype), hidden.to(dtype), weight.to(dtype).clone()


# ------------------------------------------------------------------------------------------------------- truth

Truth = Callable[[Tensors, float], tuple[float, Tensors]]  # (inputs, tau) -> loss, gradients


def kl_truth(inputs: Tensors, tau: float) -> tuple[float, Tensors]:
    """tau^2 KL, mean over the rows, and its gradient to the student's logits."""
    student, teacher = inputs[:2]
    answer = oracle(student, teacher, tau, rows_at_once=max(8, 500_000 // student.shape[1]))
    return answer.loss, (torch.from_numpy(answer.student),)


def mse_truth(inputs: Tensors, tau: float) -> tuple[float, Tensors]:
    """Mean squared difference."""
    student, teacher = inputs
    answer = oracle(student, teacher, MSE, rows_at_once=max(8, 500_000 // student.shape[1]))
    return answer.loss, (torch.from_numpy(answer.student),)


def huber_truth(inputs: Tensors, tau: float) -> tuple[float, Tensors]:
    """Mean pseudo-Huber loss: x^2 / (1 + sqrt(1 + x^2)) for sqrt(1 + x^2) - 1."""
    x = (inputs[0].double() - inputs[1].double()) / DELTA
    root = (1 + x * x).sqrt()
    return DELTA**2 * (x * x / (1 + root)).mean().item(), (DELTA * x / root / x.numel(),)


def kd_truth(inputs: Tensors, tau: float) -> tuple[float, Tensors]:
    """The KL and the cross-entropy mixed."""
    loss, (gradient,) = kl_truth(inputs, tau)
    log_q, target = F.log_softmax(inputs[0].double(), -1), inputs[2][:, None]
    hard = -log_q.gather(1, target).mean().item()
    to_hard = log_q.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float64)).div_(len(target))
    return (1 - ALPHA) * hard + ALPHA * loss, ((1 - ALPHA) * to_hard + ALPHA * gradient,)


def linear_kl_truth(inputs: Tensors, tau: float) -> tuple[float, Tensors]:
    """The KL of exact logits, and its gradient to the student's hidden states and weight."""
    hidden, weight, teacher_hidden, teacher_weight = (x.double() for x in inputs)
    loss, (gradient,) = kl_truth((hidden @ weight.T, teacher_hidden @ teacher_weight.T), tau)
    return loss, (gradient @ weight, gradient.T @ hidden)


# ------------------------------------------------------------------------------------------------------ losses


@dataclass(frozen=True)
class Loss:
    """A loss: how its inputs are made, which of them get a gradient, its truth, and whether its inputs are logits."""

    inputs: Callable[[int, int, torch.dtype], Tensors]
    wanted: tuple[int, ...]
    truth: Truth
    of_logits: bool = True


LOSSES = {
    "kl_div_tau": Loss(logits, (0,), kl_truth),
    "logit_mse": Loss(logits, (0,), mse_truth),
    "logit_huber": Loss(logits, (0,), huber_truth),
    "kd_loss": Loss(labelled_logits, (0,), kd_truth),
    "linear_kl": Loss(hidden_states, (0, 1), linear_kl_truth, of_logits=False),
}


def least_bytes(loss: str, call: str, inputs: Tensors) -> int | None:
    """What has to cross the memory bus: every input read once and, forward + backward, the student's gradient written once.

    The loss itself, a number, is not counted. None for linear_kl, whose time is that of its matrix products.
    """
    if not LOSSES[loss].of_logits:
        return None
    read = sum(x.numel() * x.element_size() for x in inputs)
    written = inputs[0].numel() * inputs[0].element_size() if call == "fwd+bwd" else 0
    return read + written


# --------------------------------------------------------------------------------------------------- providers


def eager_kl(tau: float) -> Call:
    """The expression that kdfast replaces."""

    def kl(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * tau**2

    return kl


def eager_kd(tau: float) -> Call:
    """The two losses that kd_loss replaces."""
    soft = eager_kl(tau)

    def kd(s: Tensor, t: Tensor, target: Tensor) -> Tensor:
        return (1 - ALPHA) * F.cross_entropy(s, target) + ALPHA * soft(s, t)

    return kd


def eager_huber(s: Tensor, t: Tensor) -> Tensor:
    """Pseudo-Huber, which PyTorch does not have by itself."""
    return DELTA**2 * ((1 + ((s - t) / DELTA) ** 2).sqrt() - 1).mean()


def after_linear(make: Maker) -> Maker:
    """A loss of logits, on the logits of hidden states."""

    def maker(tau: float) -> Call:
        loss = make(tau)
        return lambda hidden, weight, teacher_hidden, teacher_weight: loss(hidden @ weight.T, teacher_hidden @ teacher_weight.T)

    return maker


EAGER: dict[str, Maker] = {
    "kl_div_tau": eager_kl,
    "logit_mse": lambda tau: lambda s, t: F.mse_loss(s, t),
    "logit_huber": lambda tau: eager_huber,
    "kd_loss": eager_kd,
    "linear_kl": after_linear(eager_kl),
}


def compiled(make: Maker) -> Maker:
    """torch.compile for the shapes, dtype and threads of its first call."""

    def maker(tau: float) -> Call:
        torch._dynamo.reset()
        return torch.compile(make(tau), dynamic=False)

    return maker


def fused(backend: str) -> dict[str, Maker]:
    """kdfast by one of its backends."""

    def kl(tau: float) -> Call:
        return lambda s, t: kdfast.kl_div_tau(s, t, tau, backend=backend)

    return {
        "kl_div_tau": kl,
        "logit_mse": lambda tau: lambda s, t: kdfast.logit_mse(s, t, backend=backend),
        "logit_huber": lambda tau: lambda s, t: kdfast.logit_huber(s, t, DELTA, backend=backend),
        "kd_loss": lambda tau: lambda s, t, y: kdfast.kd_loss(s, t, y, tau=tau, alpha=ALPHA, backend=backend),
        "linear_kl": after_linear(kl),
    }


def liger_kl(tau: float) -> Call:
    """Its KL takes log-probabilities."""
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda s, t: loss(F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1)) * tau**2


def liger_linear(tau: float) -> Call:
    """Takes the teacher's probabilities at tau; divides the student's logits by tau itself."""
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    def call(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        target = F.softmax(teacher_hidden @ teacher_weight.T / tau, -1)
        return liger_fused_linear_kl_div(hidden, weight, target, reduction="batchmean", temperature=tau) * tau**2

    return call


def orda_linear(tau: float) -> Call:
    """Its KL has the factor tau^2 already. The labels are for its cross-entropy, whose weight is 0 here."""
    from orda_kernel import SeparateTeacher, distillation_loss

    def call(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        teacher = SeparateTeacher(hidden=teacher_hidden, weight=teacher_weight)
        backend = "triton" if hidden.is_cuda else "torch"
        options = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0, "kl_temperature": tau}
        return distillation_loss(hidden, weight, labels, teacher, **options, backend=backend).loss

    return call


def fla_linear(tau: float) -> Call:
    """It has no temperature: the hidden states are divided by it."""
    from fla.modules.fused_kl_div import FusedKLDivLoss

    loss = FusedKLDivLoss()
    return lambda h, w, teacher_h, teacher_w: loss(h / tau, teacher_h / tau, w, teacher_w) * tau**2


def trl_linear(tau: float) -> Call:
    """beta = 0 is KL(teacher || student), one value a row."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def call(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        arguments = (hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0, tau)
        return ChunkedDivergenceFunction.apply(*arguments)[0].mean() * tau**2

    return call


def torchdistill_kd(tau: float) -> Call:
    """Its alpha weighs the cross-entropy, its beta the KL with the factor tau^2."""
    from torchdistill.losses.mid_level import KDLoss

    loss = KDLoss("logits", "output", "logits", "output", temperature=tau, alpha=1 - ALPHA, beta=ALPHA)
    wrap = lambda x: {"logits": {"output": x}}  # noqa: E731
    return lambda s, t, target: loss(wrap(s), wrap(t), target)


def torchdistill_kl(tau: float) -> Call:
    """Without labels it is the KL alone, without the factor tau^2."""
    from torchdistill.losses.mid_level import KDLoss

    loss = KDLoss("logits", "output", "logits", "output", temperature=tau, alpha=0.0)
    wrap = lambda x: {"logits": {"output": x}}  # noqa: E731
    return lambda s, t: loss(wrap(s), wrap(t)) * tau**2


@dataclass(frozen=True)
class Provider:
    """Who computes losses. ``module`` is what has to be importable, from the distribution ``package``."""

    losses: Mapping[str, Maker]
    package: str = "torch"
    module: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def version(self) -> str:
        """Name and version, for the CSV file."""
        return f"{self.package} {metadata.version(self.package)}"

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        if device.type not in self.devices:
            return f"its kernels run on {' and '.join(self.devices)}, not on {device.type}"
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name and self.module.split(".")[0] == error.name:
                return f"not installed (pip install {self.package})"
            return f"{self.package} needs {error.name}, which is not installed"
        except Exception as error:  # a package that does not fit this torch or machine: its own words say why
            return f"{self.package} cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}"
        return None


PROVIDERS = {
    "kdfast": Provider(fused("cpp"), "kdfast", "kdfast"),
    "kdfast-triton": Provider(fused("triton"), "kdfast", "kdfast.triton", ("cuda",)),
    "eager": Provider(EAGER),
    "compile": Provider({loss: compiled(make) for loss, make in EAGER.items()}),
    "liger": Provider(
        {"kl_div_tau": liger_kl, "linear_kl": liger_linear}, "liger-kernel", "liger_kernel.transformers", ("cuda",)
    ),
    "orda": Provider({"linear_kl": orda_linear}, "orda-kernel", "orda_kernel"),
    "fla": Provider({"linear_kl": fla_linear}, "flash-linear-attention", "fla.modules.fused_kl_div", ("cuda",)),
    "trl": Provider({"linear_kl": trl_linear}, "trl", "trl.kernels.chunked_divergence"),
    "torchdistill": Provider(
        {"kl_div_tau": torchdistill_kl, "kd_loss": torchdistill_kd}, "torchdistill", "torchdistill.losses.mid_level"
    ),
}
