"""What is measured: for each op its sizes, its implementations, and the least work that any implementation has to do.

The limit of a pass is that least work at the speed measured beside it. Of n bytes of logits or activations:

    cross_entropy           forward reads the logits (n), backward reads them and writes their gradient (2n);
                            both together could do with one reading (2n): the gradient of a mean is known row by row.
                            Class probabilities are n more to read in each
    batch_norm              forward reads x and writes y (2n), backward reads x and dy and writes dx (3n);
                            both 5n, since dy is not known before the forward pass has ended. In evaluation, too: the
                            gradient of the weight takes x
    batch_norm + add + relu forward reads the residual, too (3n), and backward writes its gradient (4n); both 7n.
                            The mask of relu, with add or without, is not counted: a bit an element would do
    linear_cross_entropy    one matrix product of 2·N·H·C FLOPs forward, two backward; both 6·N·H·C
    residual_block          two convolutions of 2·N·H·W·9·C² FLOPs each forward, twice that backward
    mlp                     two matrix products of 2·N·H·(F + V) FLOPs together forward, twice that backward

Targets, parameters and statistics are small beside these and not counted.
"""

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Callable

import torch
import torch.nn.functional as torch_F

import fused_ops
import fused_ops.functional as F
from benchmarks import memory, peers

PASSES = ("forward", "backward", "both")
OF_PRODUCTS = {"forward": 1, "backward": 2, "both": 3}  # the work of matrix products: two gradients for one product
FUSED = "fused_ops"
IN_PLACE = "fused_ops, inplace_grad"
CHUNKED = "PyTorch, chunked"


@dataclass(frozen=True)
class Implementation:
    function: Callable  # of the case's tensors
    context: Callable = nullcontext  # entered around forward and backward
    optional: bool = False  # not ours: may be missing, fail or be wrong, and the row gives no times but the reason
    overwrites: bool = False  # its inputs: it gets some of its own


@dataclass(frozen=True)
class Tensors:
    """One set of inputs: the arguments, which of them get gradients, and the gradient of the output if it's no loss."""

    args: tuple
    upstream: torch.Tensor | None = None

    def inputs(self):
        return [t for t in self.args if t.requires_grad]

    def nbytes(self):
        return self.args[0].nbytes

    def copy(self):
        args = (t.detach().clone().requires_grad_(t.requires_grad) for t in self.args)
        return Tensors(tuple(args), self.upstream)


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple
    dtype: torch.dtype
    tensors: Callable  # device -> Tensors
    eager: Callable  # of the tensors, as a user of PyTorch writes it
    fused: Callable
    work: dict  # pass -> times the bytes of the input; or times the FLOPs, where these are given
    variant: str = ""
    flops: int | None = None  # of the matrix products forward; None: bytes are what limits the op
    product: tuple | None = None  # rows, inner size and columns of the product that their rate is measured on
    others: dict = field(default_factory=dict)  # further implementations by name, ours and optional ones
    tolerance: float | None = None  # of the norm of what eager gives; None: what goes for the dtype
    quick: bool = False  # measured with --quick
    curve: bool = False  # only there to show how cost grows with size

    @property
    def size(self):
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self):
        return " ".join(filter(None, (self.op, self.size, self.dtype_name, self.variant)))

    def implementations(self):
        """By name, in the order of the table. PyTorch's eager mode is first: the others are compared with it."""
        ours = {name: other for name, other in self.others.items() if not other.optional}
        return {
            "eager": Implementation(self.eager),
            # dynamic=False: a kernel for this size, as the others have, and not for the sizes measured before
            "torch.compile": Implementation(torch.compile(self.eager, dynamic=False), optional=True),
            **{name: other for name, other in self.others.items() if other.optional},
            "reference": Implementation(self.fused, context=fused_ops.reference_mode),
            FUSED: Implementation(self.fused),
            **ours,
        }


def _cross_entropy_in_place(input, target):
    return F.cross_entropy(input, target, inplace_grad=True)


def cross_entropy(shape, dtype, probabilities=False, **options):
    """Logits (N, C) or (N, C, d1, ...), with class indices or with class probabilities."""
    rows, classes, *positions = shape

    def tensors(device):
        input = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
        if probabilities:
            return Tensors((input, torch.randn(shape, dtype=dtype, device=device).softmax(1)))
        return Tensors((input, torch.randint(classes, (rows, *positions), device=device)))

    return Case(
        op="cross_entropy",
        shape=shape,
        dtype=dtype,
        tensors=tensors,
        eager=torch_F.cross_entropy,
        fused=F.cross_entropy,
        work={p: times + probabilities for p, times in {"forward": 1, "backward": 2, "both": 2}.items()},
        variant="probabilities" * probabilities,
        others={IN_PLACE: Implementation(_cross_entropy_in_place, overwrites=True)},
        **options,
    )


def _norm(input, weight, bias, running_mean, running_var, training=True):
    return torch_F.batch_norm(input, running_mean, running_var, weight, bias, training)


def _norm_relu(*args, **options):
    return torch_F.relu(_norm(*args, **options))


def _norm_add_relu(*args, **options):
    *args, residual = args
    return torch_F.relu(_norm(*args, **options) + residual)


def _fused_norm(input, weight, bias, running_mean, running_var, residual=None, activation=None, training=True):
    options = {"activation": activation, "residual": residual}
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, **options)


_fused_norm_relu = functools.partial(_fused_norm, activation="relu")

# What follows batch norm: eager's function, ours, and the tensors of the input's size that each pass reads and writes.
FOLLOWED_BY = {
    "": (_norm, _fused_norm, {"forward": 2, "backward": 3, "both": 5}),
    "relu": (_norm_relu, _fused_norm_relu, {"forward": 2, "backward": 3, "both": 5}),
    "add relu": (_norm_add_relu, _fused_norm_relu, {"forward": 3, "backward": 4, "both": 7}),
}


def _layout(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def _of_norm(channels, device):
    """Parameters and running statistics: in float32 whatever the dtype of the input, as in mixed precision."""
    parameters = [torch.randn(channels, device=device).requires_grad_() for _ in range(2)]
    return *parameters, torch.zeros(channels, device=device), torch.ones(channels, device=device)


def batch_norm(shape, dtype=torch.float32, followed_by="", channels_last=False, training=True, **options):
    eager, fused, work = FOLLOWED_BY[followed_by]

    def tensors(device):
        def like_input():
            return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=_layout(channels_last))

        norm = _of_norm(shape[1], device)
        residual = [like_input().requires_grad_()] if "add" in followed_by else []
        return Tensors((like_input().requires_grad_(), *norm, *residual), upstream=like_input())

    return Case(
        op="batch_norm",
        shape=shape,
        dtype=dtype,
        tensors=tensors,
        eager=functools.partial(eager, training=training),
        fused=functools.partial(fused, training=training),
        work=work,
        variant=" ".join(filter(None, ("evaluation" * (not training), "channels_last" * channels_last, followed_by))),
        **options,
    )


def _residual_block(norm_relu, norm_add_relu, input, W1, W2, *norms):
    """That of a ResNet. `norms` are the parameters and running statistics of both batch norms."""
    h = norm_relu(torch_F.conv2d(input, W1, padding=1), *norms[:4])
    return norm_add_relu(torch_F.conv2d(h, W2, padding=1), *norms[4:], input)


def residual_block(shape, channels_last=False, **options):
    """What batch norm is worth where it is used: between convolutions, which have most of the work."""
    N, C, H, W = shape

    def tensors(device):
        def normal(*shape, scale=1.0):
            return torch.randn(shape, device=device).mul_(scale).contiguous(memory_format=_layout(channels_last))

        weights = [normal(C, C, 3, 3, scale=(9 * C) ** -0.5).requires_grad_() for _ in range(2)]
        norms = *_of_norm(C, device), *_of_norm(C, device)
        return Tensors((normal(*shape).requires_grad_(), *weights, *norms), upstream=normal(*shape))

    of_convolution = N * H * W, 9 * C, C
    return Case(
        op="residual_block",
        shape=shape,
        dtype=torch.float32,
        tensors=tensors,
        eager=functools.partial(_residual_block, _norm_relu, _norm_add_relu),
        fused=functools.partial(_residual_block, _fused_norm_relu, _fused_norm_relu),
        work=OF_PRODUCTS,
        variant="channels_last" * channels_last,
        flops=2 * 2 * math.prod(of_convolution),
        product=of_convolution,
        tolerance=1e-2,  # rounding decides on which side of ReLU some values are
        **options,
    )


def linear_cross_entropy(rows, features, classes, dtype, **options):
    def tensors(device):
        input = torch.randn(rows, features, dtype=dtype, device=device).requires_grad_()
        linear_weight = torch.randn(classes, features, dtype=dtype, device=device).mul_(0.02).requires_grad_()
        return Tensors((input, linear_weight, torch.randint(classes, (rows,), device=device)))

    return Case(
        op="linear_cross_entropy",
        shape=(rows, features, classes),
        dtype=dtype,
        tensors=tensors,
        eager=memory.eager,
        fused=F.linear_cross_entropy,
        work=OF_PRODUCTS,
        flops=2 * rows * features * classes,
        product=(rows, features, classes),
        others={CHUNKED: Implementation(memory.chunked, optional=True)},  # from torch 2.13 on
        **options,
    )


def _eager_mlp(input, target, C, W1, b1, bngain, bnbias, W2, b2, running_mean, running_var):
    hprebn = torch_F.linear(torch_F.embedding(input, C).flatten(1), W1, b1)
    h = torch.tanh(torch_F.batch_norm(hprebn, running_mean, running_var, bngain, bnbias, training=True))
    return torch_F.cross_entropy(torch_F.linear(h, W2, b2), target)


def mlp(rows, characters, embedding, hidden, vocab_size, **options):
    fan_in = characters * embedding

    def tensors(device):
        def parameter(*shape, scale=1.0):
            return torch.randn(shape, device=device).mul_(scale).requires_grad_()

        C, W1 = parameter(vocab_size, embedding), parameter(hidden, fan_in, scale=fan_in**-0.5)
        b1 = torch.zeros(hidden, device=device)  # without a gradient: batch norm takes b1 out, what is left is rounding
        norm = parameter(hidden), parameter(hidden)
        W2, b2 = parameter(vocab_size, hidden, scale=0.1), parameter(vocab_size)
        running = torch.zeros(hidden, device=device), torch.ones(hidden, device=device)
        X = torch.randint(vocab_size, (rows, characters), device=device)
        Y = torch.randint(vocab_size, (rows,), device=device)
        return Tensors((X, Y, C, W1, b1, *norm, W2, b2, *running))

    return Case(
        op="mlp",
        shape=(rows, fan_in, hidden, vocab_size),
        dtype=torch.float32,
        tensors=tensors,
        eager=_eager_mlp,
        fused=functools.partial(F.mlp, training=True),
        work=OF_PRODUCTS,
        flops=2 * rows * hidden * (fan_in + vocab_size),
        product=(1024, 1024, 1024),  # one of the network's own is so small that the call would be measured
        **options,
    )


def all_cases(device):
    return cpu_cases() if device == "cpu" else map(_with_peers, cuda_cases())


def _with_peers(case):
    found = peers.installed(case.op).items()
    others = {name: Implementation(peer.function, optional=True, overwrites=peer.overwrites) for name, peer in found}
    return replace(case, others=case.others | others)


def cpu_cases():
    float32, bfloat16 = torch.float32, torch.bfloat16
    yield cross_entropy((32, 27), float32, quick=True)  # the network of names
    for dtype in (float32, bfloat16):
        yield cross_entropy((1024, 1000), dtype, quick=dtype == bfloat16)
        for shape in ((4096, 8192), (2048, 32000), (512, 128256)):
            yield cross_entropy(shape, dtype)
    yield cross_entropy((1024, 1000), float32, probabilities=True)
    for shape in ((8, 21, 128, 128), (16, 1000, 49)):  # classes of pixels, and of few positions
        yield cross_entropy(shape, float32)
    for classes in (64, 1024, 16384):
        yield cross_entropy((512, classes), float32, curve=True)

    for followed_by in ("", "add relu"):
        for shape in ((32, 200), (4096, 64), (4096, 1024), (65536, 256)):
            yield batch_norm(shape, followed_by=followed_by, quick=shape == (32, 200))
        for shape in ((32, 64, 56, 56), (32, 256, 14, 14)):
            for channels_last in (False, True):
                yield batch_norm(shape, followed_by=followed_by, channels_last=channels_last)
    for dtype in (bfloat16, torch.float16):
        for channels_last in (False, True):
            yield batch_norm((32, 64, 56, 56), dtype, channels_last=channels_last)
    for dtype in (float32, torch.float16):
        yield batch_norm((32, 64, 56, 56), dtype, training=False)
    for rows in (32, 1024, 8192):
        yield batch_norm((rows, 256), curve=True)

    yield residual_block((2, 16, 14, 14), quick=True)
    for shape in ((16, 64, 56, 56), (16, 256, 14, 14)):
        for channels_last in (False, True):
            yield residual_block(shape, channels_last)

    yield linear_cross_entropy(256, 128, 4096, float32, quick=True)
    yield linear_cross_entropy(2048, 768, 32000, float32)

    yield mlp(32, 3, 10, 200, 27, quick=True)
    yield mlp(256, 3, 10, 1000, 27)


def cuda_cases():
    """The small sizes, where the calls are what costs, and those that are worth a card: up to 4 GiB a tensor."""
    yield cross_entropy((32, 27), torch.float32, quick=True)
    for classes in (32768, 65536, 131072, 262144):
        yield cross_entropy((8192, classes), torch.bfloat16)

    yield batch_norm((32, 200), quick=True)
    for dtype in (torch.float32, torch.bfloat16):
        for followed_by in FOLLOWED_BY:
            for shape in ((32, 64, 112, 112), (128, 256, 56, 56), (256, 1024, 14, 14)):
                for channels_last in (False, True):
                    yield batch_norm(shape, dtype, followed_by, channels_last)

    yield linear_cross_entropy(256, 128, 4096, torch.float32, quick=True)
    yield linear_cross_entropy(8192, 4096, 128256, torch.bfloat16)

    yield mlp(32, 3, 10, 200, 27, quick=True)
