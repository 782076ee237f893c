"""Handling a batch (N, C, ...) and vectors of its channels, (C,): shapes, layouts, and vmap's batch of batches."""

import torch
from torch._prims_common import suggest_memory_format

from fused_ops._op import batch_first


def all_but_channels(x):
    return [0, *range(2, x.dim())]


def per_channel(v, x):
    """v, (C,), in a shape that broadcasts against x: (C, 1, ...)."""
    return v.view(-1, *[1] * (x.dim() - 2))


def mean_of_channels(x):
    """Of each channel, (1, C, 1, ...)."""
    return x.mean(all_but_channels(x), keepdim=True)


def gain(weight, x):
    """γ in a shape that broadcasts against x, (C, 1, ...), in its dtype; 1 where there is none."""
    return x.new_ones(()) if weight is None else per_channel(weight.to(x.dtype), x)


def dense(x):
    """x itself where it is contiguous or channels_last, else a copy: channels_last if its strides have that order.

    These are the layouts that PyTorch's outputs have.
    """
    return x.contiguous(memory_format=suggest_memory_format(x))


def in_layout_of(x, t):
    """t itself where its strides are those of x, of its shape, else a copy with those of x."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def folded(t, dim, B):
    """vmap's batch as channels: (N, B·C, ...) of an input, (B·C,) of a vector of channels. Other arguments stay."""
    if not isinstance(t, torch.Tensor):
        return t
    t = batch_first(t, dim, B)  # (B, N, C, ...) or (B, C)
    return t.flatten() if t.dim() == 2 else t.movedim(0, 1).flatten(1, 2)


def unfolded(tensors, B):
    """(N, B, C, ...) or (B, C) again, and where in each the batch is."""
    in_dims = [0 if t.dim() == 1 else 1 for t in tensors]
    outputs = (t.unflatten(dim, (B, t.shape[dim] // B)) for t, dim in zip(tensors, in_dims, strict=True))
    return tuple(outputs), tuple(in_dims)
