"""Builds the kernels: `fused_ops/_C` from csrc/cpu with a C++ compiler, `fused_ops/_C_cuda` from csrc/cuda with nvcc.

Where a compiler is missing, or with FUSED_OPS_BUILD=0, its library is left out and the ops run their references;
FUSED_OPS_BUILD=cpu leaves out `_C_cuda` alone. Where a compiler is there and fails, so does the installation, with the
compiler's message. `_C_cuda` compiles beside any torch, but loads only where torch has CUDA. Metadata is in
pyproject.toml.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # every torch >= 2.10
VECTORIZE = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]  # keeps NaN and inf, unlike -ffast-math
CXX = [*STABLE_ABI, "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", *VECTORIZE]
NVCC = [*STABLE_ABI, "-O3", "-std=c++17", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]


def extension(name, sources, **kwargs):
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(sources))
    return cpp_extension.CppExtension(f"fused_ops.{name}", sources, py_limited_api=True, **kwargs)


def cuda_extension(toolkit):
    # What torch leaves unset where it, or this machine, has no CUDA: the toolkit, and the cards to compile for.
    cpp_extension.CUDA_HOME = str(toolkit)
    if torch.cuda.device_count() == 0:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0+PTX")
    return extension(
        "_C_cuda",
        "csrc/cuda/*.cu",
        extra_compile_args={"nvcc": NVCC},
        library_dirs=[str(toolkit / "lib64")],
        libraries=["cudart"],
        # libtorch names libtorch_cuda where there is one; nothing else here does, so keep it although it has no symbols
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
    )


def find_cuda_toolkit():
    """The folder of a CUDA toolkit, or None. nvcc itself may be a link, or a script that only calls it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for folder in map(Path, filter(None, candidates)):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return folder
    return None


def extensions():
    wanted = os.environ.get("FUSED_OPS_BUILD")
    if wanted == "0":
        return
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        print(f"fused_ops: no C++ compiler ({compiler}) found, installing without kernels", file=sys.stderr)
        return
    yield extension("_C", "csrc/cpu/*.cpp", extra_compile_args={"cxx": CXX})
    if wanted != "cpu" and (toolkit := find_cuda_toolkit()):
        yield cuda_extension(toolkit)


if __name__ == "__main__":  # docs/cuda_report.py imports the flags
    setup(
        ext_modules=list(extensions()),
        cmdclass={"build_ext": cpp_extension.BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
