"""Linear cross-entropy in chunks: how the op runs on every device. Names: `fused_ops.ops.linear_cross_entropy`.

A chunk of rows has all that its rows need: its logits become their gradient where they lie, and that gives the rows'
dx. Only dW is a sum over all rows, and so over all chunks. In 16 bits such a sum would be rounded with every chunk; in
float32 it takes twice the memory of dW, which beside large vocabularies is more than all chunks. But there is room for
half of it: dW's own, which nobody needs yet. So where matrices of 16 bits are multiplied,

    1. chunks of rows give the losses, dx and db; and of dW the first half of W's rows, summed in float32 in the storage
       of all of dW, and rounded at the end, where they lie;
    2. lse is now known of every row. So the logits of the other half are computed once more, for all rows and some of
       the classes at a time, and become their gradient: their rows of dW are one product over all rows, rounded once.

That costs half a product more than the three there are (z, dx and dW), and no memory but a chunk's.
"""

import math
from typing import Optional

import torch
from torch import Tensor

from fused_ops._op import accumulate_dtype, define, directly, has_kernel
from fused_ops.ops import cross_entropy as ce
from fused_ops.ops.cross_entropy_derivatives import class_targets, mean_weights, reduced, row_gradient, softcapped
from fused_ops.ops.linear_cross_entropy_derivatives import default_chunk_size


def cross_entropy_slice_backward_(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    stats: Tensor,
    A: Tensor,
    first: int,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: Optional[float],
) -> None:
    """dx_nc = g_n·(A_n·p_nc − t_nc)·k_nc, as `cross_entropy_backward` has it, of a slice of the classes.

    Written over the logits, (N, n), of the classes from `first` on, of so many `classes` in all. What takes all of them
    is handed in: stats, (2, N), and A, (N). dloss is (N), class indices are (N), the class weights (C).
    """
    slice_ = torch.arange(first, first + logits.shape[1], device=logits.device)  # (n)
    m, log_z = stats.unsqueeze(2)  # (N, 1) each
    s, k = softcapped(logits.to(stats.dtype), softcap)  # (N, n); (N, n) or 1
    p = ((s - m) - log_z).exp()  # (N, n)
    w = A.new_ones(classes) if weight is None else weight.to(A.dtype)  # (C)
    y, kept, w_y = class_targets(target, w, ignore_index)  # (N) each
    t = torch.where(y[:, None] == slice_, (1 - label_smoothing) * w_y[:, None], 0)  # (N, n)
    t = t + label_smoothing / classes * w[slice_]  # (N, n)
    dx = dloss[:, None] * (A[:, None] * p - t) * k  # (N, n)
    logits.copy_(dx.where(kept[:, None], 0))


_slice_backward_ = directly(define(cross_entropy_slice_backward_, mutates_args=("logits",)))


def product_dtype(input):
    """The dtype in which matrices are multiplied: that of the input, of 16 bits, too, where the device has products of
    these that are summed and returned in float32, as CUDA's are; else the accumulate dtype."""
    sums = has_kernel("aten::addmm.dtype_out", input.device.type)
    return input.dtype if sums else accumulate_dtype(input.dtype)


def forward_in_chunks(input, linear_weight, linear_bias, target, weight, ignore_index, reduction, *others):
    divisor = mean_weights(target, weight, ignore_index, accumulate_dtype(input.dtype)).sum()  # ()
    g = row_gradient(torch.ones_like(divisor), reduction, divisor, target.shape[0])[:, 0]  # (N·D)
    tensors = input, linear_weight, linear_bias, target, weight
    losses, *gradients = _in_chunks(g, *tensors, ignore_index, *others)
    return reduced(losses, reduction, divisor), divisor, *gradients


def backward_in_chunks(dloss, input, linear_weight, linear_bias, target, weight, divisor, ignore_index, *others):
    reduction, *others = others
    g = row_gradient(dloss.to(divisor.dtype), reduction, divisor, target.shape[0])[:, 0]  # (N·D)
    _, *gradients = _in_chunks(g, input, linear_weight, linear_bias, target, weight, ignore_index, *others)
    return tuple(gradients)


def _in_chunks(g, input, linear_weight, linear_bias, target, weight, *options):
    """The losses of all rows, (N·D,), and the gradients that are needed where g_n comes back to row n's loss."""
    ignore_index, *smooth, classes, chunk_size, needs = options
    W = linear_weight.to(product_dtype(input))  # (D·C, H)
    D = W.shape[0] // classes
    N = input.shape[0]
    # so many rows that products are efficient; those of 16 bits would else take less time than to add them to dW
    chunk_size = chunk_size or (1024 if W.dtype != g.dtype else default_chunk_size(input))
    chunks = max(1, math.ceil(N / chunk_size))
    chunk_size = max(1, math.ceil(N / chunks))  # as many chunks, but of about the same size
    losses, stats = g.new_empty(target.shape[0]), []  # (N·D); of each chunk (2, n·D)
    room = W.new_empty(max(N, chunk_size * W.shape[0]))  # for the logits of a chunk, or of one class of all rows
    dinput = input.new_empty(input.shape) if needs[0] else input.new_empty(0)
    db = g.new_zeros(W.shape[0] if needs[2] else 0)
    dtarget = target.new_empty(target.shape) if needs[3] else input.new_empty(0)
    if needs[1] and chunks > 1 and W.dtype != g.dtype and not target.is_floating_point():
        dW = W.new_empty(W.shape)
        in_sum = W.shape[0] // 2  # the rows of W whose gradients are summed over chunks
        sums = dW.view(-1)[: 2 * in_sum * W.shape[1]].view(g.dtype).view(in_sum, W.shape[1])
    else:
        in_sum = W.shape[0]
        dW = sums = W.new_empty(W.shape if needs[1] else 0, dtype=W.dtype if chunks == 1 else g.dtype)
    with torch.autocast(input.device.type, enabled=False):  # the caller has cast what there was to cast
        for start in range(0, N, chunk_size):
            examples = slice(start, start + chunk_size)
            rows = slice(start * D, (start + chunk_size) * D)
            x, y = input[examples].to(W.dtype), target[rows]  # (n, H), (n·D) or (n·D, C)
            y = y.to(W.dtype) if y.is_floating_point() else y
            z = _logits(x, W, linear_bias, room)  # (n, D·C)
            logits = z.view(-1, classes)  # (n·D, C)
            losses[rows], *saved = ce.forward_op(logits, y, weight, ignore_index, "none", *smooth)
            stats.append(saved[0])
            if not any(needs):
                continue
            dy = ce.backward_op_(g[rows], logits, y, weight, *saved, ignore_index, "none", *smooth, needs[3])
            if needs[2]:
                db += z.sum(0, dtype=db.dtype)  # (D·C): the gradient lies where the logits were
            if needs[0]:
                dinput[examples] = torch.mm(z, W)  # (n, H)
            if needs[1]:
                _multiply(z[:, :in_sum].t(), x, out=sums, add=start > 0)  # (D·C, H) or a half of it
            if needs[3]:
                dtarget[rows] = dy
        if in_sum < W.shape[0]:
            _round_in_place(sums, dW)
            _other_classes(g, torch.cat(stats, 1), (input, W, linear_bias, target, weight), options, room, dW, in_sum)
    if N == 0:
        dW.zero_()
    return losses, dinput, dW.to(input.dtype), db.to(input.dtype), dtarget


def _round_in_place(sums, dW):
    """The sums of the first rows of dW, rounded to their place; they lie in the storage of dW.

    Row i of the sums lies where rows 2i and 2i + 1 of dW do. So rows from i on, up to 2i, go to their place all at
    once: they overwrite those from i/2 to i, which have gone before.
    """
    begin, end, n = 0, 1, sums.shape[0]
    while begin < n:
        rows = slice(begin, min(end, n))
        dW[rows] = sums[rows] if begin else sums[rows].clone()  # the first would overwrite itself
        begin, end = end, 2 * end


def _other_classes(g, stats, tensors, options, room, dW, begin):
    """The rows of dW from `begin` on, as products over all examples: at a time those of some classes of one loss."""
    x, W, b, target, weight = tensors
    ignore_index, label_smoothing, z_loss, softcap, classes, *_ = options
    N, D = x.shape[0], W.shape[0] // classes
    w = g.new_ones(classes) if weight is None else weight.to(g.dtype)  # (C)
    _, _, w_y = class_targets(target, w, ignore_index)  # (N·D)
    A = (1 - label_smoothing) * w_y + label_smoothing / classes * w.sum() + 2 * z_loss * stats.sum(0)  # (N·D)
    most = room.numel() // N
    most = most // 64 * 64 or most  # products are fastest where rows of z begin at bounds of 16 bytes
    while begin < W.shape[0]:
        d, first = divmod(begin, classes)
        part = slice(begin, min(begin + most, (d + 1) * classes))
        z = _logits(x, W[part], None if b is None else b[part], room)  # (N, n)
        of_rows = target[d::D], weight, stats[:, d::D], A[d::D]  # (N), (C), (2, N), (N)
        _slice_backward_(g[d::D], z, *of_rows, first, classes, ignore_index, label_smoothing, softcap)
        _multiply(z.t(), x, out=dW[part], add=False)  # (n, H)
        begin = part.stop


def _logits(x, W, b, room):
    """z = x·Wᵀ + b, where there is room for it."""
    z = room[: x.shape[0] * W.shape[0]].view(x.shape[0], W.shape[0])
    if b is not None:
        z.copy_(b)
    _multiply(x, W.t(), out=z, add=b is not None)
    return z


def _multiply(a, b, *, out, add):
    """out = a·b, or out + a·b, in the dtype of `out`."""
    dtype = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, beta=float(add), out=out, **dtype)  # beta = 0 reads nothing from out
