"""The gradient that cross-entropy makes in its forward pass, while the logits are in cache."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops.functional as F

generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 5, 9, 8, generator=generator)
SEGMENTS = torch.randint(5, (2, 9, 8), generator=generator)
every_shape = pytest.mark.parametrize(
    ("logits", "target"),
    [
        (IMAGES[:, :, 0, 0].contiguous(), SEGMENTS[:, 0, 0]),
        (IMAGES, SEGMENTS),
        (IMAGES.to(memory_format=torch.channels_last), SEGMENTS),
    ],
    ids=["rows", "positions", "channels_last"],
)


@every_shape
@pytest.mark.parametrize("dloss", [1.0, -3.0, 0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_that_of_the_backward_pass(logits, target, dloss, dtype):
    """The first backward pass multiplies it by dloss, later ones start from the logits. Ignored rows stay 0."""
    logits = logits.detach().to(dtype).requires_grad_()
    ignored = int(target.flatten()[0])
    dloss = torch.tensor(dloss, dtype=dtype)
    loss = F.cross_entropy(logits, target, ignore_index=ignored)
    first, second = (torch.autograd.grad(loss, logits, dloss, retain_graph=True)[0] for _ in range(2))
    (theirs,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, target, ignore_index=ignored), logits, dloss
    )
    assert first.stride() == second.stride() == logits.stride()
    for ours in (first, second):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert_close(ours.nan_to_num(0, 0, 0), theirs.nan_to_num(0, 0, 0), rtol=0.02, atol=1e-3)
    if dloss == 1:
        assert torch.equal(first, second)


@every_shape
def test_it_is_given_away_once(logits, target):
    """Who writes to a gradient does not change the next one; second derivatives leave it to be taken."""
    logits = logits.detach().clone().requires_grad_()
    loss = F.cross_entropy(logits, target)
    (created,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert created.requires_grad
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_close(second, created.detach())
    loss.backward()
    assert_close(logits.grad, created.detach())


@every_shape
def test_logits_changed_before_the_backward_pass_are_noticed(logits, target):
    logits = logits.detach().clone().requires_grad_()
    loss = F.cross_entropy(logits, target)
    with torch.no_grad():
        logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("made", "requires_grad", "reduction", "dtype", "enabled"),
    [
        (True, True, "mean", torch.float32, True),
        (True, True, "sum", torch.bfloat16, True),
        (False, False, "mean", torch.float32, True),
        (False, True, "none", torch.float32, True),
        (False, True, "mean", torch.float16, True),
        (False, True, "mean", torch.float32, False),
    ],
)
def test_it_is_made_where_it_will_serve(made, requires_grad, reduction, dtype, enabled):
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fused_ops":
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with torch.set_grad_enabled(enabled), Calls():
        F.cross_entropy(IMAGES.detach().to(dtype).requires_grad_(requires_grad), SEGMENTS, reduction=reduction)
    ops = torch.ops.fused_ops
    assert calls == [ops.cross_entropy_with_gradient.default if made else ops.cross_entropy_forward.default]


def test_the_op_that_makes_it_is_not_detached_in_silence():
    logits = IMAGES[:, :, 0, 0].contiguous().requires_grad_()
    args = logits, SEGMENTS[:, 0, 0], None, -100, "mean", 0.0, 0.0, None, False
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        torch.ops.fused_ops.cross_entropy_with_gradient(*args)
    with torch.no_grad():
        loss, dlogits = torch.ops.fused_ops.cross_entropy_with_gradient(*args)
    expected = F.cross_entropy(*args[:2])
    assert torch.equal(loss, expected)
    assert torch.equal(dlogits, *torch.autograd.grad(expected, args[0]))
