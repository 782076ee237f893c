"""The lecture's own data file is not ours to ship: the tests of it run where FUSED_OPS_SEED_NAMES names a copy.

And the tally of the conformance suites (tests/tally.py): a fixture to count with, and the table in the summary.
"""

import os
from pathlib import Path

# A graph in PyTorch's cache is known by its ops, not by their gradients: it would outlive a change of these.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# Threads that wait for others are not to keep a processor from these: pytest's workers have as many each as there are.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from tally import Table, Tally

collect_ignore = [] if os.environ.get("FUSED_OPS_SEED_NAMES") else ["test_seed.py"]

FILES = ("tests/test_opinfo.py", "tests/test_moduleinfo.py", "tests/test_hypothesis.py")


def pytest_addoption(parser):
    parser.addoption(
        "--kernels",
        metavar="FILE",
        help="test the kernels of this library in place of the package's own (make test-emulated)",
    )
    parser.addoption(
        "--write-conformance",
        metavar="FILE",
        type=Path,
        help="write the conformance suites' counts to FILE, if all passed",
    )


def pytest_configure(config):
    if library := config.getoption("--kernels"):
        os.environ["FUSED_OPS_BUILD"] = "0"  # fused_ops, which is not imported yet, is not to load its own
        import fused_ops

        torch.ops.load_library(library)
        assert fused_ops.has_kernels("cpu")


@pytest.fixture
def tally(request):
    return Tally(request.node.user_properties)


@pytest.fixture
def one_thread():
    """For many small tensors: several threads would only wait for each other, for minutes where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    table = Table(report for reports in terminalreporter.stats.values() for report in reports)
    if not table.counts:
        return
    terminalreporter.section("conformance: cases tried")
    for line in table.text():
        terminalreporter.line(line)
    path = config.getoption("--write-conformance")
    if path is not None and exitstatus != 0:
        terminalreporter.line(f"{path} was not written, since not all tests passed", red=True)
    elif path is not None:
        command = f'make test ARGS="{" ".join(FILES)} --write-conformance {path}"'
        path.write_text("\n".join(table.markdown(command)) + "\n", encoding="utf-8")
        terminalreporter.line(f"wrote {path}")
