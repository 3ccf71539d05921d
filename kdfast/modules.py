"""The losses as modules. Each holds the options of its function and calls it."""

from typing import Any

from torch import Tensor, nn

from kdfast import functional
from kdfast.functional import KDParts, Number


class _LogitLoss(nn.Module):
    """What the modules share: the options of every loss, and a representation that shows them."""

    def __init__(self, reduction: str, num_classes: int | None, inplace_backward: bool, backend: str) -> None:
        super().__init__()
        self.reduction = reduction
        self.num_classes = num_classes
        self.inplace_backward = inplace_backward
        self.backend = backend

    def _options(self, row_weight: Tensor | None, denominator: Number | Tensor | None) -> dict[str, Any]:
        """The arguments that every loss takes."""
        return {
            "reduction": self.reduction,
            "row_weight": row_weight,
            "denominator": denominator,
            "num_classes": self.num_classes,
            "inplace_backward": self.inplace_backward,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        # (Not a method put on the instance, as wrappers of models do: its representation holds this one.)
        options = {k: v for k, v in vars(self).items() if not (k.startswith("_") or k == "training" or callable(v))}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class KLDivTau(_LogitLoss):
    """:func:`kdfast.kl_div_tau` as a module: ``KLDivTau(tau=4.0)(student_logits, teacher_logits)``."""

    def __init__(
        self,
        tau: Number = 1.0,
        *,
        teacher_tau: Number | None = None,
        scale_by_tau_squared: bool = True,
        reduction: str = "batchmean",
        num_classes: int | None = None,
        inplace_backward: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction, num_classes, inplace_backward, backend)
        self.tau = tau
        self.teacher_tau = teacher_tau
        self.scale_by_tau_squared = scale_by_tau_squared

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        row_weight: Tensor | None = None,
        denominator: Number | Tensor | None = None,
    ) -> Tensor:
        return functional.kl_div_tau(
            student_logits,
            teacher_logits,
            self.tau,
            teacher_tau=self.teacher_tau,
            scale_by_tau_squared=self.scale_by_tau_squared,
            **self._options(row_weight, denominator),
        )


class LogitMSE(_LogitLoss):
    """:func:`kdfast.logit_mse` as a module: ``LogitMSE()(student_logits, teacher_logits)``."""

    def __init__(
        self,
        *,
        center: bool = False,
        reduction: str = "mean",
        num_classes: int | None = None,
        inplace_backward: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction, num_classes, inplace_backward, backend)
        self.center = center

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        row_weight: Tensor | None = None,
        denominator: Number | Tensor | None = None,
    ) -> Tensor:
        return functional.logit_mse(
            student_logits,
            teacher_logits,
            center=self.center,
            **self._options(row_weight, denominator),
        )


class LogitHuber(_LogitLoss):
    """:func:`kdfast.logit_huber` as a module: ``LogitHuber(delta=0.5)(student_logits, teacher_logits)``."""

    def __init__(
        self,
        delta: Number = 1.0,
        *,
        kind: str = "pseudo",
        center: bool = False,
        reduction: str = "mean",
        num_classes: int | None = None,
        inplace_backward: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction, num_classes, inplace_backward, backend)
        self.delta = delta
        self.kind = kind
        self.center = center

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        row_weight: Tensor | None = None,
        denominator: Number | Tensor | None = None,
    ) -> Tensor:
        return functional.logit_huber(
            student_logits,
            teacher_logits,
            self.delta,
            kind=self.kind,
            center=self.center,
            **self._options(row_weight, denominator),
        )


class KDLoss(_LogitLoss):
    """:func:`kdfast.kd_loss` as a module: ``KDLoss(tau=4.0, alpha=0.9)(student_logits, teacher_logits, target)``."""

    def __init__(
        self,
        *,
        tau: Number = 4.0,
        alpha: Number = 0.9,
        soft: str = "kl",
        ignore_index: int = -100,
        label_smoothing: Number = 0.0,
        reduction: str = "mean",
        num_classes: int | None = None,
        return_parts: bool = False,
        inplace_backward: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction, num_classes, inplace_backward, backend)
        self.tau = tau
        self.alpha = alpha
        self.soft = soft
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.return_parts = return_parts

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        denominator: Number | Tensor | None = None,
    ) -> Tensor | KDParts:
        return functional.kd_loss(
            student_logits,
            teacher_logits,
            target,
            tau=self.tau,
            alpha=self.alpha,
            soft=self.soft,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            return_parts=self.return_parts,
            **self._options(row_weight, denominator),
        )
