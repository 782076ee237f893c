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
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


@pytest.fixture
def sources(tmp_path):
    """A copy of what the installation builds from."""
    for name in ("csrc", "fused_ops"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def python(folder, *arguments, **environment):
    environment = {**os.environ, "FUSED_OPS_BUILD": "1", "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def build_in_place(sources, **environment):
    return python(sources, "setup.py", "-q", "build_ext", "--inplace", **environment)


def libraries(sources):
    return [path.name for path in (sources / "fused_ops").glob("*.so")]


@pytest.mark.parametrize("environment", [{"FUSED_OPS_BUILD": "0"}, {"CXX": "no-such-compiler"}], ids=str)
def test_without_a_compiler_nothing_is_built_and_nothing_fails(environment, sources):
    result = build_in_place(sources, **environment)
    assert result.returncode == 0, result.stderr
    assert libraries(sources) == []
    assert ("no C++ compiler (no-such-compiler) found" in result.stderr) == ("CXX" in environment)


@NEEDS_COMPILER
def test_the_cpu_kernels_can_be_built_alone(monkeypatch):
    monkeypatch.setenv("FUSED_OPS_BUILD", "cpu")
    extensions = runpy.run_path(str(ROOT / "setup.py"))["extensions"]
    monkeypatch.setitem(extensions.__globals__, "find_cuda_toolkit", lambda: Path("/usr/local/cuda"))
    assert [extension.name for extension in extensions()] == ["fused_ops._C"]


def test_what_is_installed_has_all_that_it_needs(sources):
    python(sources, "setup.py", "-q", "build_py", FUSED_OPS_BUILD="0")
    (built,) = (sources / "build").glob("lib*")
    result = python(built, "-m", "fused_ops.compare", FUSED_OPS_BUILD="0")
    assert result.returncode == 0, result.stderr
    assert "maxdiff" in result.stdout


@NEEDS_COMPILER
def test_a_failed_build_is_reported(sources):
    shutil.rmtree(sources / "csrc" / "cuda")  # an nvcc that is not of torch's CUDA would end the build before
    for source in (sources / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("#error broken on purpose\n")  # all of them, for the build waits for those that compile
    result = build_in_place(sources)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout + result.stderr
    assert libraries(sources) == []


@pytest.mark.parametrize("library", [None, "_C.abi3.so"], ids=["missing", "damaged"])
def test_an_import_without_kernels_warns_and_works(library, sources):
    if library:
        (sources / "fused_ops" / library).write_bytes(b"not a library")
    code = (
        "import torch, fused_ops; print(fused_ops.has_kernels('cpu'));"
        "print(fused_ops.functional.cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item())"
    )
    result = python(sources, "-c", code)
    assert result.returncode == 0, result.stderr
    has_kernels, loss = result.stdout.split()
    assert has_kernels == "False"
    assert float(loss) == pytest.approx(1.3862944)
    assert ("could not load its kernels" if library else "without compiled kernels") in result.stderr


@pytest.mark.skipif(not torch.version.cuda, reason="needs a torch with CUDA, with or without a card")
@pytest.mark.skipif("_C_cuda.abi3.so" not in libraries(ROOT), reason="needs the CUDA kernels: nvcc was not found")
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
