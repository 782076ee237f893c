"""Calls leave nothing behind: what a process has allocated does not grow with the calls that it has made."""

import ctypes
from functools import partial
from itertools import pairwise

import pytest
import torch
from checks import differentiated, every_device

import fused_ops
import fused_ops.functional as F

CALLS = 500

LIBC = ctypes.CDLL(None)
NEEDS_MALLINFO = pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="glibc alone counts what is allocated")


class Mallinfo2(ctypes.Structure):
    """Of <malloc.h>, in bytes or chunks."""

    FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def bytes_in_use():
    LIBC.mallinfo2.restype = Mallinfo2
    info = LIBC.mallinfo2()
    return info.uordblks + info.hblkhd  # on the heap, and mapped


def leaf(device, *shape):
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0)).requires_grad_()


def targets(device):
    return torch.arange(8, device=device) % 5


def cross_entropy(device, **options):
    return F.cross_entropy, (leaf(device, 8, 5), targets(device)), options


def linear_cross_entropy(device, **options):
    return F.linear_cross_entropy, (leaf(device, 8, 3), leaf(device, 5, 3), targets(device)), options


def batch_norm(device, **options):
    parameters = leaf(device, 5), leaf(device, 5)
    return F.batch_norm, (leaf(device, 8, 5), None, None, *parameters), {"training": True, **options}


def mlp(device):
    network = fused_ops.nn.MLP(5, 3, 4, 6).to(device)
    return F.mlp, (torch.zeros(8, 4, dtype=torch.long, device=device), targets(device), *network._tensors()), {}


CASES = {
    "cross-entropy": cross_entropy,
    "cross-entropy-none": partial(cross_entropy, reduction="none"),
    "cross-entropy-options": partial(cross_entropy, label_smoothing=0.1, z_loss=1e-3, softcap=30.0),
    "linear-cross-entropy": linear_cross_entropy,
    "linear-cross-entropy-none": partial(linear_cross_entropy, reduction="none"),
    "batch-norm": batch_norm,
    "batch-norm-gelu": partial(batch_norm, activation="gelu"),
    "mlp": mlp,
}


@NEEDS_MALLINFO
@every_device
@pytest.mark.parametrize("case", CASES)
def test_calls_leave_nothing_behind(case, device):
    function, args, options = CASES[case](device)
    leaves = differentiated(args)

    def calls():
        for _ in range(CALLS):
            torch.autograd.grad(function(*args, **options).sum(), leaves)
        return bytes_in_use()

    used = [calls() for _ in range(4)]  # now and then they keep some, to use it again
    assert min(after - before for before, after in pairwise(used)) < 8 * CALLS  # less than the smallest chunk of each
