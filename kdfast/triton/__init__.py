"""The losses as Triton kernels: OPERATORS maps the name of each operator of the namespace kdfast_triton (those of csrc/ops.cpp) to a
function of the same arguments.

Importing this package imports triton; `import kdfast` does neither.
"""

from collections.abc import Callable
from typing import Any

from kdfast.triton import kd_loss, kl_div_tau, launch, logit_huber, logit_mse

OPERATORS: dict[str, Callable[..., Any]] = {
    "scale_gradient": launch.scale_gradient,
    "scale_gradient_inplace": launch.scale_gradient_inplace,
    **{
        f"{loss.__name__.rsplit('.', 1)[-1]}_{kind}": f
        for loss in (kl_div_tau, logit_mse, logit_huber, kd_loss)
        for kind, f in loss.OPERATORS.items()
    },
}
