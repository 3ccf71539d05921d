"""``python -m kdfast.info`` prints what was built and what of it this machine can use: attach it to a bug report."""

from __future__ import annotations

import importlib
import importlib.util
import platform

import torch

from kdfast import _C, __version__


def describe() -> dict[str, str]:
    """The printed lines, as {name: value}."""
    build = _C.build_info()
    version = __version__
    if version != build["version"]:
        version += f" (but its extension is of {build['version']}: reinstall)"
    return {
        "kdfast": version,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built against {build['torch_version']})",
        "compiler": build["compiler"],
        "cpp on CPU": f"{build['cpu_isa']} (usable here: {', '.join(build['cpu_isas'])}; KDFAST_CPU_ISA chooses)",
        "cpp on CUDA": _cuda(build),
        "triton": _triton(),
        "reference": "any device",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }


def _cuda(build: _C.BuildInfo) -> str:
    if not build["cuda"]:
        return "not built"
    return f"built with CUDA {build['cuda_version']} for {' '.join(build['cuda_archs'])}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # (Not the distribution's version, whose name is another one in torch's ROCm builds.)
    return f"triton {importlib.import_module('triton').__version__}"


def main() -> None:
    lines = describe()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
