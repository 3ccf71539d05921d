"""Builds kdfast._C from csrc/*.cpp, csrc/cpu/*.cpp and, where a CUDA toolkit fits torch, csrc/cuda/*.cu.

KDFAST_CUDA=1 makes a missing toolkit an error and KDFAST_CUDA=0 leaves the CUDA kernels out;
CUDA_HOME and TORCH_CUDA_ARCH_LIST choose the toolkit and its targets; MAX_JOBS caps the parallel compilers.
"""

import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

import torch
from setuptools import find_packages, setup

nvcc_flags = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]


def cuda_toolkit() -> tuple[str, str]:
    """(root, version) of the CUDA toolkit to build with. LookupError says why there is none."""
    if not glob("csrc/cuda/*.cu"):
        raise LookupError("there are no CUDA kernels in csrc/cuda")
    if torch.version.cuda is None:
        raise LookupError(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        raise LookupError(f"there is no nvcc {f'in {home}/bin' if home else 'on PATH'}; install the CUDA toolkit")
    # The nvcc on PATH may be a wrapper script far from the toolkit, so it is asked where it lives.
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    root = re.search(r"^#\$ TOP=(.+)$", told, re.M)
    version = re.search(r"__CUDACC_VER_MAJOR__=(\d+).*?__CUDACC_VER_MINOR__=(\d+)", told)
    if root is None or version is None:
        raise LookupError(f"{nvcc} --dryrun does not name its toolkit: {told.strip()[:200]}")
    if version[1] != torch.version.cuda.split(".")[0]:
        raise LookupError(f"{nvcc} is CUDA {version[1]}.{version[2]}, torch is built for CUDA {torch.version.cuda}")
    return os.path.realpath(root[1]), f"{version[1]}.{version[2]}"


project_version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M)[1]
# Never -ffast-math or -march: infinities and NaN are data here, and each ISA unit names its own instruction set.
flags = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
flags += [f"-ffile-prefix-map={Path.cwd()}/="]  # a message names csrc/ops.cpp, not the folder it was built in
build: dict = {
    "sources": sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
    "depends": sorted(p for p in glob("csrc/**/*", recursive=True) if p.endswith((".h", ".inl", ".cuh"))),
    "include_dirs": [str(Path("csrc").resolve())],
    "extra_compile_args": {"cxx": flags, "nvcc": nvcc_flags},
    "define_macros": [
        ("TORCH_TARGET_VERSION", "0x020d000000000000"),  # the oldest torch that the binary runs on: 2.13
        ("KDFAST_VERSION", f'"{project_version}"'),
        ("KDFAST_TORCH_VERSION", f'"{torch.__version__}"'),
    ],
}

wanted = os.environ.get("KDFAST_CUDA", "")
if wanted not in ("", "0", "1"):
    raise SystemExit(f"kdfast: KDFAST_CUDA must be 0 or 1; got {wanted!r}")
if wanted == "0":
    print("kdfast: building the CPU kernels only (KDFAST_CUDA=0)")
else:
    try:
        root, version = cuda_toolkit()
        os.environ["CUDA_HOME"] = root
        # Read by cpp_extension, which would otherwise look for a GPU and fail without one.
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            has_sm_100 = tuple(map(int, version.split("."))) >= (12, 8)
            os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX;10.0" if has_sm_100 else "8.0;9.0+PTX"
            # The code for 10.0 is made from the PTX of 9.0, since the kernels have nothing of its own: a quarter of the time less.
            of_90 = "sm_90,sm_100,compute_90" if has_sm_100 else "sm_90,compute_90"
            nvcc_flags += ["-gencode=arch=compute_80,code=sm_80", f"-gencode=arch=compute_90,code=[{of_90}]"]
        build["sources"] += sorted(glob("csrc/cuda/*.cu"))
        build["include_dirs"] += [f"{root}/include"]
        build["library_dirs"] = [f"{root}/lib64", f"{root}/lib"]
        build["libraries"] = ["cudart"]
        build["define_macros"] += [
            ("KDFAST_WITH_CUDA", None),
            ("KDFAST_CUDA_VERSION", f'"{version}"'),
            ("KDFAST_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
        ]
        print(f"kdfast: building the CPU and the CUDA kernels (CUDA {version}, {os.environ['TORCH_CUDA_ARCH_LIST']})")
    except LookupError as missing:
        if wanted == "1":
            raise SystemExit(f"kdfast: KDFAST_CUDA=1, but {missing}") from None
        print(f"kdfast: building the CPU kernels only: {missing}")

from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402  (reads CUDA_HOME when imported)


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # without ninja, nothing else notices a changed setting or another torch
        self.build_temp = "build/objects"  # ninja reuses them; in pip's editable mode the default is a new folder each time


setup(
    packages=[*find_packages(include=["kdfast*"]), "kdfast_bench"],
    package_dir={"kdfast_bench": "benchmarks"},  # beside kdfast, which stays light
    ext_modules=[CppExtension("kdfast._C", **build)],
    cmdclass={"build_ext": Build},
)
