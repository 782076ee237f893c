"""Linear cross-entropy by products of 16-bit matrices that are summed and returned in float32.

PyTorch has these on CUDA alone. Here they are made up on the CPU, in float32, of what the op hands to them.
"""

import pytest
import torch

import fused_ops.functional as F

N, H, C = 50, 24, 40


@pytest.fixture
def products():
    """The shapes of the products made so far."""
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
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

    chunk = [(17, H, C), (C, 17, H)]  # logits, dW; the last one is shorter
    last = [(16, H, C), (C, 16, H)]
    logits_before = reduction == "none" or dtype == torch.float16  # the gradients come in the backward pass
    assert products == [product[0] for product in [chunk, chunk, last] if logits_before] + chunk + chunk + last


def test_float32_is_multiplied_as_ever(products):
    tensors = torch.randn(N, H), torch.randn(C, H), torch.randn(C)
    gradients(F.linear_cross_entropy, tensors, torch.randint(C, (N,)), 1.0, torch.float32)
    assert products == []
