from typing import TypedDict

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
