from typing import TypedDict

from torch import Tensor

PAIRS_PER_TASK: int  # the most logit pairs of a call that are not worth splitting over threads

class BuildInfo(TypedDict):
    version: str
    torch_version: str  # the torch it was built against
    compiler: str
    cpu_isas: list[str]  # built in and usable on this machine, the plainest first
    cpu_isa: str  # the one in use
    cuda: bool  # CUDA kernels built in
    cuda_version: str  # "" without CUDA kernels, as is an empty cuda_archs
    cuda_archs: list[str]

def build_info() -> BuildInfo: ...

# A call on the CPU for one thread, past torch's dispatcher. Each writes the loss, and its parts if it has any, into `values` and,
# unless None, the student's gradient into `gradient`; False, with nothing written, where it does not take the call (csrc/direct.cpp).
def kl_div_tau(
    values: tuple[Tensor, ...],
    gradient: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    reduction: int,
    tau: float,
    teacher_tau: float,
    scale_by_tau_squared: bool,
    /,
) -> bool: ...
def logit_mse(
    values: tuple[Tensor, ...],
    gradient: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    reduction: int,
    center: bool,
    tau_limit: bool,
    /,
) -> bool: ...
def logit_huber(
    values: tuple[Tensor, ...],
    gradient: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    reduction: int,
    delta: float,
    smooth_l1: bool,
    center: bool,
    /,
) -> bool: ...
def kd_loss(
    values: tuple[Tensor, ...],
    gradient: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    reduction: int,
    target: Tensor,
    tau: float,
    alpha: float,
    soft: int,
    ignore_index: int,
    label_smoothing: float,
    /,
) -> bool: ...
def scale_gradient(gradient: Tensor, grad_loss: Tensor, /) -> bool: ...
