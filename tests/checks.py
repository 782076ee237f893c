"""What the checks of several test files share: running a function with its gradients, and comparing with the truth."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

F64 = torch.float64
FLOATS = (torch.float32, F64, torch.bfloat16, torch.float16)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])


def with_dtypes(params, supported):
    """Each pytest parameter once for every float dtype among those that `supported(*its values)` gives."""
    return [
        pytest.param(*param.values, dtype, marks=param.marks, id=f"{param.id}-{str(dtype).removeprefix('torch.')}")
        for param in params
        for dtype in FLOATS
        if dtype in supported(*param.values)
    ]


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def differentiated(sample):
    return [t for t in tensors(sample) if t.requires_grad]


def copies(args, dtype=None):
    """Copies of the tensors among args, with the same strides; the floating ones in `dtype` if one is given."""

    def copy(t):
        if not isinstance(t, torch.Tensor):
            return t
        storage = t.detach().untyped_storage().clone()  # not t.clone(), which makes other strides dense
        same = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.size(), t.stride())
        return same.to(dtype) if dtype and t.is_floating_point() else same

    return tree_map(copy, args)


def run(function, sample, dtype=None, parameters=(), cotangent=lambda dout: dout):
    """The function's output and gradients, for one cotangent, and what it left in the other tensors.

    In another dtype where one is given: torch's own function in float64 says what ours should give. `parameters` are
    what the function differentiates by besides its arguments; `cotangent` changes the strides of the cotangent.
    """
    copied = copies(sample, dtype)
    for t, original in zip(tensors(copied), tensors(sample), strict=True):
        t.requires_grad_(original.requires_grad)
    inputs = [*differentiated(copied), *parameters]
    out = function(*copied.args, **copied.kwargs)
    dout = torch.rand(out.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    dout = dout.to(differentiated(sample)[0].dtype).to(out)  # the same numbers, whatever the dtype of out
    grads = torch.autograd.grad(out, inputs, cotangent(dout))
    left = [t for t in tensors(copied) if not t.requires_grad]
    return out.detach(), grads, left


def assert_as_near(ours, theirs, truth, of="results"):
    """Our tensors are as near to the truth, computed in float64, as theirs are; same dtypes and shapes.

    Near: within `assert_close`'s tolerance for the dtype, plus 1.5 times their own error (of a sum that cancels, say).
    A failure names the tensor by its place among the `of`.
    """
    for i, (actual, peer, expected) in enumerate(zip(*map(tensors, (ours, theirs, truth)), strict=True)):
        place = f"tensor {i} of the {of}"
        kind, expected_kind = ((t.dtype, tuple(t.shape)) for t in (actual, peer))
        assert kind == expected_kind, f"{place}: {kind} is not {expected_kind}"
        rtol, atol = torch.testing._comparison.default_tolerances(actual.dtype)
        error = (peer.double() - expected.double()).abs()
        error = error[error.isfinite()].max().item() if error.isfinite().any() else 0.0
        tolerances = {"rtol": rtol, "atol": atol + 1.5 * error, "equal_nan": True}
        assert_close(actual, expected.to(actual.dtype), **tolerances, msg=lambda text, place=place: f"{place}: {text}")


def of_inputs(function, sample):
    """The function of the differentiable inputs alone; it moves copies of the others."""
    positions = {id(t): i for i, t in enumerate(differentiated(sample))}

    def function_of_inputs(*inputs):
        def replace(t):
            if not isinstance(t, torch.Tensor):
                return t
            return inputs[positions[id(t)]] if id(t) in positions else t.clone()

        args, kwargs = tree_map(replace, tuple(sample))
        return function(*args, **kwargs)

    return function_of_inputs
