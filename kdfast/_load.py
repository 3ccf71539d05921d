"""Loads the extension, after torch and only into a torch it was built for."""

import importlib.metadata
import importlib.util

import torch
from torch.torch_version import TorchVersion

__version__ = importlib.metadata.version("kdfast")

OLDEST_TORCH = "2.13"


def check_torch(version: str) -> None:
    """Raises ImportError where `version` of torch is older than the stable ABI this package is built on."""
    if TorchVersion(version) < OLDEST_TORCH:
        raise ImportError(
            f"kdfast {__version__} takes torch >= {OLDEST_TORCH}; found torch {version}. Upgrade it: pip install -U torch"
        )


check_torch(torch.__version__)
try:
    from kdfast import _C
except ImportError as error:
    raise ImportError(
        f"kdfast {__version__} cannot load its extension kdfast._C under torch {torch.__version__}: {error}. "
        "Build and install the package with: pip install --no-build-isolation ."
    ) from error

HAS_CUDA_KERNELS: bool = _C.build_info()["cuda"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
