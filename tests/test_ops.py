"""Every op through every check, on every sample.

The reference is the oracle, so the checks form a chain: torch's function (in float64) proves the reference, and the
undecorated reference proves the kernel. The ops beneath a public function are caught as it calls them, forward and
backward, so a new op is tested once it has samples.
"""

import contextlib

import pytest
import torch
from samples import OPS
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fused_ops
from fused_ops._op import REFERENCES

F64 = torch.float64
FLOATS = (torch.float32, F64, torch.bfloat16, torch.float16)
CASES = [pytest.param(op, case, id=f"{name}-{key}") for name, op in OPS.items() for key, case in op.cases.items()]
DIFFERENTIABLE = [param for param in CASES if param.values[1].gradcheck]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_case = pytest.mark.parametrize(("op", "case"), CASES)


def differentiated(sample):
    return [t for t in tensors(sample) if t.requires_grad]


def run(function, sample, dtype=None):
    """The function's output and gradients, for one cotangent, and what it left in the other tensors.

    In another dtype where one is given: torch's own function in float64 says what ours should give.
    """

    def copy(t):
        if not isinstance(t, torch.Tensor):
            return t
        # not clone(), which makes other strides dense
        moved = t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach().clone()
        return moved.requires_grad_(t.requires_grad)

    copied = tree_map(copy, sample)
    out = function(*copied.args, **copied.kwargs)
    inputs = differentiated(copied)
    dout = torch.rand(out.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    dout = dout.to(differentiated(sample)[0].dtype).to(out)  # the same numbers, whatever the dtype of out
    grads = torch.autograd.grad(out, inputs, dout)
    left = [t for t in tensors(copied) if not t.requires_grad]
    return out.detach(), grads, left


def assert_as_near(ours, theirs, truth):
    """Our tensors are as near to the truth, computed in float64, as theirs are; same dtypes and shapes.

    Near: within `assert_close`'s tolerance for the dtype, plus 1.5 times their own error (of a sum that cancels, say).
    """
    for actual, peer, expected in zip(tensors(ours), tensors(theirs), tensors(truth), strict=True):
        assert (actual.dtype, actual.shape) == (peer.dtype, peer.shape)
        rtol, atol = torch.testing._comparison.default_tolerances(actual.dtype)
        error = (peer.double() - expected.double()).abs()
        error = error[error.isfinite()].max().item() if error.isfinite().any() else 0.0
        assert_close(actual, expected.to(actual.dtype), equal_nan=True, rtol=rtol, atol=atol + 1.5 * error)


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def strides(t):
    """The strides that matter: not those of dimensions of size 1, nor any where there are no elements."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1] if t.numel() else []


def all_strides(tree):
    return [strides(t) for t in tensors(tree)]


def assert_matches_torch(op, sample):
    ours, theirs, truth = run(op.function, sample), run(op.torch_function, sample), run(op.torch_function, sample, F64)
    assert_as_near(ours, theirs, truth)
    assert strides(ours[0]) == strides(theirs[0])  # the output's


@every_device
@every_dtype
@every_case
def test_reference_matches_torch(op, case, dtype, device):
    with fused_ops.reference_mode():
        assert_matches_torch(op, case.build(dtype, device))


@every_device
@every_dtype
@every_case
def test_kernel_matches_torch(op, case, dtype, device):
    assert_matches_torch(op, case.build(dtype, device))


class Recorder(TorchDispatchMode):
    """Catches the calls of fused ops, with copies of their arguments as they were before the call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in REFERENCES:
            self.calls.append((func, copies(args)))
        return func(*args, **(kwargs or {}))


def copies(args, dtype=None):
    """Copies of the tensors among args, with the same strides; the floating ones in `dtype` if one is given."""

    def copy(t):
        if not isinstance(t, torch.Tensor):
            return t
        storage = t.detach().untyped_storage().clone()
        same = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.size(), t.stride())
        return same.to(dtype) if dtype and t.is_floating_point() else same

    return tree_map(copy, args)


def op_calls(op, sample):
    with Recorder() as recorder:
        run(op.function, sample)
    assert recorder.calls, "the function called no fused op"
    return recorder.calls


@every_device
@every_dtype
@every_case
def test_kernel_matches_undecorated_reference(op, case, dtype, device):
    """Each op alone: its outputs, and the arguments that it writes to."""

    def call(function, args):
        return function(*args), args

    for fused, args in op_calls(op, case.build(dtype, device)):
        reference = REFERENCES[fused]
        ours, theirs = call(fused, copies(args)), call(reference, copies(args))
        assert_as_near(ours, theirs, call(reference, copies(args, F64)))
        assert all_strides(ours) == all_strides(theirs)


def of_inputs(op, sample):
    """The function of the differentiable inputs alone; it moves copies of the others."""
    positions = {id(t): i for i, t in enumerate(differentiated(sample))}

    def function(*inputs):
        def replace(t):
            if not isinstance(t, torch.Tensor):
                return t
            return inputs[positions[id(t)]] if id(t) in positions else t.clone()

        args, kwargs = tree_map(replace, sample)
        return op.function(*args, **kwargs)

    return function


@every_device
@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize(("op", "case"), DIFFERENTIABLE)
def test_gradcheck(op, case, path, device):
    sample = case.build(F64, device)
    with fused_ops.reference_mode() if path == "reference" else contextlib.nullcontext():
        assert gradcheck(of_inputs(op, sample), differentiated(sample), check_forward_ad=True)


@every_device
@pytest.mark.parametrize(("op", "case"), DIFFERENTIABLE)
def test_gradgradcheck(op, case, device):
    """Second derivatives, reverse mode over reverse mode and forward mode over reverse mode."""
    sample = case.build(F64, device)
    assert gradgradcheck(of_inputs(op, sample), differentiated(sample), check_fwd_over_rev=True)


@every_device
@every_case
def test_opcheck(op, case, device):
    """torch.library's own checks of an op's schema, autograd registration, fake kernel and tracing."""
    for fused, args in op_calls(op, case.build(torch.float32, device)):
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not any(t.isnan().any() for t in tensors([args, fused(*copies(args))])):  # these two hold NaN unequal to NaN
            tests += ["test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
        results = torch.library.opcheck(fused, args, test_utils=tests)
        assert set(results.values()) == {"SUCCESS"}
