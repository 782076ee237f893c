"""Every op through every check, on every sample.

The reference is the oracle, so the checks form a chain: torch's function (in float64) proves the reference, and the
undecorated reference proves the kernel. The ops beneath a public function are caught as it calls them, forward and
backward, so a new op is tested once it has samples.
"""

import contextlib
import itertools

import pytest
import torch
from checks import F64, FLOATS, assert_as_near, copies, differentiated, every_device, of_inputs, run, tensors
from samples import OPS
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from fused_ops._op import REFERENCES

CASES = [pytest.param(op, case, id=f"{name}-{key}") for name, op in OPS.items() for key, case in op.cases.items()]
DIFFERENTIABLE = [param for param in CASES if param.values[1].gradcheck]

every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_case = pytest.mark.parametrize(("op", "case"), CASES)


def strides(t):
    """The strides that matter: not those of dimensions of size 1, nor any where there are no elements."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1] if t.numel() else []


def all_strides(tree):
    return [strides(t) for t in tensors(tree)]


def assert_matches_torch(op, case, dtype, device):
    sample = case.build(dtype, device)
    ours, theirs, truth = run(op.function, sample), run(op.torch_function, sample), run(op.torch_function, sample, F64)
    assert_as_near(ours, theirs, truth)
    # The output's strides: on CUDA those of torch's batch norm depend on the kernel that it chooses, ours don't.
    on_cpu = theirs if device == "cpu" else run(op.torch_function, case.build(dtype, "cpu"))
    assert strides(ours[0]) == strides(on_cpu[0])


@every_device
@every_dtype
@every_case
def test_reference_matches_torch(op, case, dtype, device):
    with fused_ops.reference_mode():
        assert_matches_torch(op, case, dtype, device)


@every_device
@every_dtype
@every_case
def test_kernel_matches_torch(op, case, dtype, device):
    assert_matches_torch(op, case, dtype, device)


class Recorder(TorchDispatchMode):
    """Catches the calls of fused ops, with copies of their arguments as they were before the call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in REFERENCES:
            self.calls.append((func, copies(args)))
        return func(*args, **(kwargs or {}))


def op_calls(op, sample):
    with Recorder() as recorder:
        run(op.function, sample)
    assert recorder.calls, "the function called no fused op"
    return recorder.calls


def assert_matches_reference(fused, args):
    """The op's outputs, and the arguments that it writes to, are those of its reference."""

    def call(function, args):
        return function(*args), args

    reference, results = REFERENCES[fused], f"outputs and arguments of {fused}"
    ours, theirs = call(fused, copies(args)), call(reference, copies(args))
    assert_as_near(ours, theirs, call(reference, copies(args, F64)), of=results)
    assert all_strides(ours) == all_strides(theirs), f"strides of the {results}"


@every_device
@every_dtype
@every_case
def test_kernel_matches_undecorated_reference(op, case, dtype, device):
    for fused, args in op_calls(op, case.build(dtype, device)):
        assert_matches_reference(fused, args)


@pytest.mark.usefixtures("one_thread")
@every_device
@pytest.mark.parametrize(("op", "case"), DIFFERENTIABLE)
def test_each_gradient_is_the_same_whatever_else_is_needed(op, case, device):
    """And kernel and reference agree on what comes back empty, because nobody needs it."""
    sample = case.build(torch.float32, device)
    inputs = differentiated(sample)
    _, everything, _ = run(op.function, sample)
    calls = {}  # by op and flags
    for needs in itertools.product((True, False), repeat=len(inputs)):
        if not any(needs):
            continue
        for t, needed in zip(inputs, needs, strict=True):
            t.requires_grad_(needed)
        with Recorder() as recorder:
            _, gradients, _ = run(op.function, sample)
        expected = tuple(itertools.compress(everything, needs))
        assert_close(gradients, expected, msg=lambda text, needs=needs: f"where inputs require grad as {needs}: {text}")
        for fused, args in recorder.calls:
            calls[fused, str([a for a in args if not isinstance(a, torch.Tensor)])] = args
    for (fused, *_), args in calls.items():
        assert_matches_reference(fused, args)


@pytest.mark.usefixtures("one_thread")
@every_device
@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize(("op", "case"), DIFFERENTIABLE)
def test_gradcheck(op, case, path, device):
    sample = case.build(F64, device)
    with fused_ops.reference_mode() if path == "reference" else contextlib.nullcontext():
        assert gradcheck(of_inputs(op.function, sample), differentiated(sample), check_forward_ad=True)


@pytest.mark.usefixtures("one_thread")
@every_device
@pytest.mark.parametrize(("op", "case"), DIFFERENTIABLE)
def test_gradgradcheck(op, case, device):
    """Second derivatives, reverse mode over reverse mode and forward mode over reverse mode.

    Every entry of their matrices where they are small, else along random directions (PyTorch's own default).
    """
    sample = case.build(F64, device)
    inputs = differentiated(sample)
    fast_mode = sum(t.numel() for t in inputs) > 40
    assert gradgradcheck(of_inputs(op.function, sample), inputs, check_fwd_over_rev=True, fast_mode=fast_mode)


@every_device
@every_case
def test_opcheck(op, case, device):
    """torch.library's own checks of an op's schema, autograd registration, fake kernel and tracing."""
    for fused, args in op_calls(op, case.build(torch.float32, device)):
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # Tracing with static shapes is in test_modes.py. With dynamic ones it holds NaN unequal to NaN.
        if not any(t.isnan().any() for t in tensors([args, fused(*copies(args))])):
            tests.append("test_aot_dispatch_dynamic")
        results = torch.library.opcheck(fused, args, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}


def test_every_kernel_is_of_a_declared_op():
    """A name misspelt in an IMPL block raises no error: the op would run its reference, and be compared with itself."""
    undeclared = [kernel for kernel in torch._C._dispatch_find_dangling_impls() if "fused_ops::" in kernel]
    assert undeclared == []
