"""Fused knowledge-distillation losses on raw logits: one call, forward and backward in one pass, right at every temperature.

>>> loss = kdfast.kl_div_tau(student_logits, teacher_logits, tau=4.0)
>>> loss.backward()
"""

from kdfast._load import __version__
from kdfast.functional import KDParts, kd_loss, kl_div_tau, logit_huber, logit_mse
from kdfast.modules import KDLoss, KLDivTau, LogitHuber, LogitMSE

__all__ = [
    "KDLoss",
    "KDParts",
    "KLDivTau",
    "LogitHuber",
    "LogitMSE",
    "__version__",
    "kd_loss",
    "kl_div_tau",
    "logit_huber",
    "logit_mse",
]
