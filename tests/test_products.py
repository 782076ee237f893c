"""Linear cross-entropy by products of 16-bit matrices that are summed in float32, in chunks.

PyTorch has those that return float32 on CUDA alone. On the CPU they are made up here, in float32, of what the op hands
to them.
"""

import weakref

import pytest
import torch
from checks import FLOATS, copies, every_device, tensors
from samples import OPS
from samples.making import Maker
from test_ops import assert_matches_torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops.functional as F
from fused_ops._op import REFERENCES, accumulate_dtype
from fused_ops.ops.cross_entropy_derivatives import dense_targets
from fused_ops.ops.linear_cross_entropy_chunks import forward_in_chunks

N, H, C = 50, 24, 40

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture
def products():
    """The shapes of the products that returned float32 on the CPU so far."""
    made = []

    def addmm(self, mat1, mat2, out_dtype, *, beta=1, alpha=1, out):
        # what PyTorch asks of the tensors on CUDA
        assert mat1.itemsize == 2
        assert mat1.dtype == mat2.dtype
        assert self.dtype == out_dtype == out.dtype == torch.float32
        made.append((*mat1.shape, mat2.shape[1]))
        return torch.addmm(self, mat1.float(), mat2.float(), beta=beta, alpha=alpha, out=out)

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield made
    library._destroy()


def gradients(loss, tensors, target, dloss, dtype, **options):
    """The loss, and its gradients by input, linear weight and linear bias."""
    x, W, b = (t.detach().to(dtype).requires_grad_() for t in tensors)
    made = loss(x, W, target, linear_bias=b, **options)
    return made.detach(), *torch.autograd.grad(made, (x, W, b), torch.full_like(made, dloss))


def unfused(x, W, target, *, linear_bias, **options):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, W, linear_bias), target, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_dtype
def test_as_exact_as_pytorch(dtype, reduction, products):
    generator = torch.Generator().manual_seed(0)
    shapes = (N, H), (C, H), (C,)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    target = torch.randint(C, (N,), generator=generator)
    target[3] = -100
    args = tensors, target, 2.0  # the gradient of the loss
    exact = gradients(unfused, *args, torch.float64, reduction=reduction)
    eager = gradients(unfused, *args, dtype, reduction=reduction)
    ours = gradients(F.linear_cross_entropy, *args, dtype, reduction=reduction, chunk_size=20)
    for actual, theirs, expected in zip(ours, eager, exact, strict=True):
        assert actual.dtype == dtype
        assert torch.dist(actual.double(), expected) <= 1.5 * torch.dist(theirs.double(), expected)
    # those of half of the weight's gradient, by chunks of rows, of which the last one is shorter
    assert products == [(C // 2, 17, H), (C // 2, 17, H), (C // 2, 16, H)]


def test_float32_is_multiplied_as_ever(products):
    tensors = torch.randn(N, H), torch.randn(C, H), torch.randn(C)
    gradients(F.linear_cross_entropy, tensors, torch.randint(C, (N,)), 1.0, torch.float32)
    assert products == []


@pytest.mark.usefixtures("products")
@every_dtype
@pytest.mark.parametrize("name", OPS["linear_cross_entropy"].cases)
def test_kernel_matches_torch(name, dtype):
    op = OPS["linear_cross_entropy"]
    assert_matches_torch(op, op.cases[name], dtype, "cpu")


# whether there are class weights; label smoothing, z-loss and softcap
OPTIONS = {"plain": (False, 0.0, 0.0, None), "everything": (True, 0.2, 0.05, 3.0)}


@every_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("classes", "first", "n"), [(40, 0, 17), (40, 17, 23), (6000, 1003, 3000), (40, 9, 0)])
def test_a_slice_is_that_of_the_whole(classes, first, n, options, dtype, device):
    """The op beside the columns of all logits' gradient, and beside its undecorated reference."""
    make, ignore_index = Maker("slices", dtype, device), 7
    logits, dloss = make(20, classes, requires_grad=False), make(20, dtype=accumulate_dtype(dtype), requires_grad=False)
    target = make.indices(20, classes=classes)
    target[3], target[5] = ignore_index, first
    weighted, eps, z_loss, softcap = OPTIONS[options]
    weight = make.weights(classes, requires_grad=False) if weighted else None
    smooth = ignore_index, "none", eps, z_loss, softcap
    _, stats, divisor = torch.ops.fused_ops.cross_entropy_forward(logits, target, weight, *smooth)
    saved = logits, target, weight, stats, divisor
    whole, _ = torch.ops.fused_ops.cross_entropy_backward(dloss, *saved, *smooth, True, False)
    t, _ = dense_targets(target, weight, ignore_index, eps, logits.to(stats.dtype))
    A = t.sum(1) + 2 * z_loss * stats.sum(0)

    op = torch.ops.fused_ops.cross_entropy_slice_backward_.default
    part = logits[:, first : first + n].contiguous()
    args = dloss, part, target, weight, stats, A, first, classes, ignore_index, eps, softcap
    results = torch.library.opcheck(op, copies(args), test_utils=["test_schema", "test_faketensor"])
    assert set(results.values()) == {"SUCCESS"}
    of_kernel, of_reference = copies(args), copies(args)
    op(*of_kernel)
    REFERENCES[op](*of_reference)
    assert_close(of_kernel[1], whole[:, first : first + n])
    assert_close(of_kernel[1], of_reference[1])
    assert not of_kernel[1][3].any()


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that ops return, until they are gone."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tensors([args, kwargs])}
        for storage in {t.untyped_storage() for t in tensors(out)}:
            if storage._cdata not in known | self.sizes.keys():
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@every_dtype
def test_no_more_memory_than_a_chunk(dtype, products):
    """Beyond inputs and gradients: the logits of a chunk, and little more."""
    rows, features, classes, chunk_size = 512, 64, 8192, 64
    x, W, b = (torch.randn(*shape, dtype=dtype) for shape in [(rows, features), (classes, features), (classes,)])
    target = torch.randint(classes, (rows,))
    options = -100, "mean", 0.0, 0.0, None, classes, chunk_size, [True, True, True, False]
    with Memory() as memory:
        results = forward_in_chunks(x, W, b, target, None, *options)
    assert products, "no products of 16 bits"
    assert memory.peak - sum(t.nbytes for t in results) < 1.2 * chunk_size * classes * dtype.itemsize
