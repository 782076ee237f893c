"""Builds the kernels: `fused_ops/_C` from csrc/cpu with a C++ compiler, `fused_ops/_C_cuda` from csrc/cuda with nvcc.

Where a compiler is missing, or with FUSED_OPS_BUILD=0, its library is left out and the ops run their references. Where
one is there and fails, so does the installation, with the compiler's message. Metadata is in pyproject.toml.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # every torch >= 2.10
VECTORIZE = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]  # keeps NaN and inf, unlike -ffast-math
CXX = [*STABLE_ABI, "-O3", "-std=c++17", "-fvisibility=hidden", *VECTORIZE]
NVCC = [*STABLE_ABI, "-O3", "-std=c++17", "-DUSE_CUDA"]


def extension(kind, name, folder, **compile_args):
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob("*.c*"))
    return kind(f"fused_ops.{name}", sources, extra_compile_args=compile_args, py_limited_api=True)


def extensions():
    if os.environ.get("FUSED_OPS_BUILD") == "0":
        return
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        print(f"fused_ops: no C++ compiler ({compiler}) found, installing without kernels", file=sys.stderr)
        return
    yield extension(cpp_extension.CppExtension, "_C", "cpu", cxx=CXX)
    if shutil.which("nvcc") and any((ROOT / "csrc" / "cuda").glob("*.cu")):
        yield extension(cpp_extension.CUDAExtension, "_C_cuda", "cuda", cxx=CXX, nvcc=NVCC)


setup(
    ext_modules=list(extensions()),
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
