"""Linear cross-entropy's directional derivatives, chunk by chunk. Names: `fused_ops.ops.linear_cross_entropy`.

Let x, W and b move along ẋ, Ẇ and ḃ, and class probabilities along u. Then the logits move along

    v = ż = ẋ·Wᵀ + x·Ẇᵀ + ḃ

and what `fused_ops.ops.cross_entropy_derivatives` says of the loss and of dz along (v, u) holds here. By the product
rule the gradients dx = dz·W, dW = dzᵀ·x and db = Σ_n dz_n change by

    d(dx) = d(dz)·W + dz·Ẇ        d(dW) = d(dz)ᵀ·x + dzᵀ·ẋ        d(db) = Σ_n d(dz)_n

which is both forward mode over reverse mode and, by the symmetry of second derivatives, reverse over reverse.
"""

import torch

from fused_ops._op import accumulate_dtype
from fused_ops.ops.cross_entropy_derivatives import RowDerivatives, reduced, row_gradient


def linear_logits(input, linear_weight, linear_bias, classes):
    """z = x·Wᵀ + b as rows of classes, (N·D, C)."""
    return torch.nn.functional.linear(input, linear_weight, linear_bias).view(-1, classes)


def accumulated(tensors):
    """The tensors, or None, in the accumulate dtype: 16-bit logits would lose digits that the loss needs."""
    return [t if t is None else t.to(accumulate_dtype(t.dtype)) for t in tensors]


def default_chunk_size(input):
    """How many rows have their logits in memory at a time: H/2, whose logits are half as many as weights, or 128."""
    return max(128, input.shape[1] // 2)


def _logits_along(input, linear_weight, input_t, linear_weight_t, linear_bias_t, classes):
    """How fast the logits change as x, W and b move along their tangents: ẋ·Wᵀ + x·Ẇᵀ + ḃ, (N·D, C), or None."""
    parts = []
    if input_t is not None:
        parts.append(input_t @ linear_weight.t())  # (N, D·C)
    if linear_weight_t is not None:
        parts.append(input @ linear_weight_t.t())  # (N, D·C)
    if linear_bias_t is not None:
        parts.append(linear_bias_t.expand(input.shape[0], -1))  # (N, D·C)
    return sum(parts).reshape(-1, classes) if parts else None


def _chunks(input, linear_weight, linear_bias, target, weight, tangents, options):
    """For each chunk of rows: x and ẋ, (n, H); their places among all rows; their `RowDerivatives`; v, (n·D, C)."""
    ignore_index, _, *smooth, classes, chunk_size = options
    chunk_size = chunk_size or default_chunk_size(input)
    D = linear_weight.shape[0] // classes
    input_t, *others_t = tangents
    for start in range(0, input.shape[0], chunk_size):
        examples = slice(start, start + chunk_size)
        rows = slice(start * D, (start + chunk_size) * D)
        x = input[examples]  # (n, H)
        x_t = None if input_t is None else input_t[examples]  # (n, H)
        v = _logits_along(x, linear_weight, x_t, *others_t, classes)  # (n·D, C)
        logits = linear_logits(x, linear_weight, linear_bias, classes)  # (n·D, C)
        yield x, x_t, rows, RowDerivatives(logits, target[rows], weight, ignore_index, *smooth), v


def loss_along(tensors, divisor, tangents, target_t, options):
    """How fast the loss changes: that of cross-entropy, along the change of the logits."""
    tensors, tangents = [*accumulated(tensors[:3]), *tensors[3:]], accumulated(tangents)
    along = [
        row.loss_along(v, None if target_t is None else target_t[rows])  # (n·D)
        for _, _, rows, row, v in _chunks(*tensors, tangents, options)
    ]
    return reduced(torch.cat(along) if along else divisor.new_zeros(0), options[1], divisor)


def gradients_along(dloss, tensors, divisor, tangents, target_t, options):
    """How fast dx, dW, db and dy change; dloss does not."""
    dtype, target = tensors[0].dtype, tensors[3]
    tensors, tangents = [*accumulated(tensors[:3]), *tensors[3:]], accumulated(tangents)
    input, linear_weight, *_ = tensors
    g = row_gradient(dloss, options[1], divisor, target.shape[0])  # (N·D, 1)
    dinput_t, dtarget_t = [input[:0]], [target[:0]]
    dlinear_weight_t = torch.zeros_like(linear_weight)  # (D·C, H)
    dlinear_bias_t = linear_weight.new_zeros(linear_weight.shape[0])  # (D·C)
    for x, x_t, rows, row, v in _chunks(*tensors, tangents, options):
        u = None if target_t is None else target_t[rows]  # (n·D, C)
        dz_t, dy_t = row.gradients_along(v, u, g[rows])  # (n·D, C) each
        dz, dz_t = (t.reshape(x.shape[0], -1) for t in (row.gradient(g[rows]), dz_t))  # (n, D·C) each
        x_along = dz_t @ linear_weight  # (n, H)
        if tangents[1] is not None:
            x_along = x_along + dz @ tangents[1]  # (n, H)
        dlinear_weight_t = dlinear_weight_t + dz_t.t() @ x  # (D·C, H)
        if x_t is not None:
            dlinear_weight_t = dlinear_weight_t + dz.t() @ x_t  # (D·C, H)
        dlinear_bias_t = dlinear_bias_t + dz_t.sum(0)  # (D·C)
        dinput_t.append(x_along)
        dtarget_t.append(dy_t.to(target.dtype) if target.is_floating_point() else target[:0])
    sums = torch.cat(dinput_t), dlinear_weight_t, dlinear_bias_t
    return *(t.to(dtype) for t in sums), torch.cat(dtarget_t)
