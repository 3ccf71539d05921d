"""Loads the extension, after torch and only into a torch it was built for."""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

IN_SOURCES = (Path(__file__).parents[1] / "setup.py").exists()
HOW_TO_BUILD = (
    "This is the source folder, which hides an installed kdfast: leave it, or build here: pip install --no-build-isolation --editable ."
    if IN_SOURCES
    else "Build and install the package with: pip install --no-build-isolation ."
)
try:
    __version__ = importlib.metadata.version("kdfast")
except importlib.metadata.PackageNotFoundError:
    raise ImportError(f"kdfast is not installed. {HOW_TO_BUILD}") from None

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
        f"kdfast {__version__} cannot load its extension kdfast._C under torch {torch.__version__}: {error}. {HOW_TO_BUILD}"
    ) from error

HAS_CUDA_KERNELS: bool = _C.build_info()["cuda"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
