"""What the installation does with and without a compiler, and what the package says of kernels that it hasn't got."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import fused_ops

ROOT = Path(__file__).parents[1]
IN_PLACE = "build_ext", "--inplace"
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


@pytest.fixture
def sources(tmp_path):
    """A copy of what the installation builds from."""
    for name in ("csrc", "fused_ops"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(sources, *command, **environment):
    environment = {**os.environ, "FUSED_OPS_BUILD": "1", **environment}
    command = [sys.executable, "setup.py", "-q", *command]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)


def libraries(sources, name="*"):
    return [path.name for path in (sources / "fused_ops").glob(f"{name}.*so")]


@pytest.mark.parametrize("environment", [{"FUSED_OPS_BUILD": "0"}, {"CXX": "no-such-compiler"}], ids=str)
def test_without_a_compiler_nothing_is_built_and_nothing_fails(environment, sources):
    result = build(sources, *IN_PLACE, **environment)
    assert result.returncode == 0, result.stderr
    assert libraries(sources) == []
    assert ("no C++ compiler (no-such-compiler) found" in result.stderr) == ("CXX" in environment)


def test_what_is_installed_has_all_that_it_needs(sources):
    build(sources, "build_py", FUSED_OPS_BUILD="0")
    (built,) = (sources / "build").glob("lib*")
    environment = {**os.environ, "FUSED_OPS_BUILD": "0", "PYTHONPATH": str(built)}
    command = [sys.executable, "-m", "fused_ops.compare"]
    result = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "maxdiff" in result.stdout


@NEEDS_COMPILER
def test_a_failed_build_is_reported(sources):
    for source in (sources / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("#error broken on purpose\n")  # all of them, for the build waits for those that compile
    result = build(sources, *IN_PLACE)
    assert result.returncode != 0
    reasons = "broken on purpose", "CUDA version"  # the latter before any compiler runs, if nvcc's is not that of torch
    assert any(reason in result.stdout + result.stderr for reason in reasons)
    assert libraries(sources) == []


@pytest.mark.parametrize("library", [None, "_C.abi3.so"], ids=["missing", "damaged"])
def test_an_import_without_kernels_warns_and_works(library, sources):
    if library:
        (sources / "fused_ops" / library).write_bytes(b"not a library")
    code = (
        "import torch, fused_ops; print(fused_ops.has_kernels('cpu'));"
        "print(fused_ops.functional.cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item())"
    )
    environment = {**os.environ, "FUSED_OPS_BUILD": "1", "PYTHONPATH": str(sources)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=True)
    has_kernels, loss = result.stdout.split()
    assert has_kernels == "False"
    assert float(loss) == pytest.approx(1.3862944)
    assert ("could not load its kernels" if library else "without compiled kernels") in result.stderr


@pytest.mark.skipif(not torch.version.cuda, reason="needs a torch with CUDA, with or without a card")
@pytest.mark.skipif(not libraries(ROOT, "_C_cuda"), reason="needs the CUDA kernels: nvcc was not found")
def test_the_cuda_kernels_load_without_a_card():
    assert fused_ops.has_kernels("cuda")


@NEEDS_COMPILER
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.name)
def test_sources_compile_with_the_headers_of_this_torch(source):
    """Which need not be the torch that the kernels were built with."""
    include = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    command = ["c++", *runpy.run_path(str(ROOT / "setup.py"))["CXX"], *include, "-fsyntax-only", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
