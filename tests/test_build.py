"""What the installation does with and without a compiler, and what the package says of kernels that it hasn't got."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sources(tmp_path):
    """A copy of what the installation builds from."""
    for name in ("csrc", "fused_ops"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(sources, **environment):
    environment = {**os.environ, "FUSED_OPS_BUILD": "1", **environment}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)


def libraries(sources):
    return [path.name for path in (sources / "fused_ops").glob("*.so")]


@pytest.mark.parametrize("environment", [{"FUSED_OPS_BUILD": "0"}, {"CXX": "no-such-compiler"}], ids=str)
def test_without_a_compiler_nothing_is_built_and_nothing_fails(environment, sources):
    result = build(sources, **environment)
    assert result.returncode == 0, result.stderr
    assert libraries(sources) == []
    assert ("no C++ compiler (no-such-compiler) found" in result.stderr) == ("CXX" in environment)


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_a_failed_build_is_reported(sources):
    (sources / "csrc" / "cpu" / "batch_norm.cpp").write_text("#error broken on purpose\n")
    result = build(sources)
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
    environment = {**os.environ, "FUSED_OPS_BUILD": "1", "PYTHONPATH": str(sources)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=True)
    has_kernels, loss = result.stdout.split()
    assert has_kernels == "False"
    assert float(loss) == pytest.approx(1.3862944)
    assert ("could not load its kernels" if library else "without compiled kernels") in result.stderr
