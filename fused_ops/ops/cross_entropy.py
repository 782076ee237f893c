"""Cross-entropy, from logits to loss in one op and back in another.

    N  rows (examples)          x   logits, (N, C)
    C  classes                  y   target classes, (N,), or target probabilities, (N, C)
    w  class weights, (C,)      ε   label_smoothing
    ζ  z_loss                   cap softcap

The logits may first be capped smoothly, s = cap·tanh(x/cap), or s = x. Every form of the loss is then a weighted sum of
−log-probabilities, and perhaps a penalty that keeps the log-sum-exp near zero,

    loss_n = Σ_c t_nc·(lse_n − s_nc) + ζ·lse_n²          lse_n = log Σ_c exp(s_nc)

and only the weights t differ ([c = y_n] is 1 where c is the target, else 0; w_y is the target's weight):

    class indices            t_nc = (1−ε)·w_y·[c = y_n] + (ε/C)·w_c
    class probabilities      t_nc = w_c·((1−ε)·y_nc + ε/C)

Softmax is the gradient of lse: ∂lse/∂s_c = exp(s_c − lse) = p_c. And tanh' = 1 − tanh². So one line serves every form,

    dx_nc = g_n·(A_n·p_nc − t_nc)·k_nc          A_n = Σ_c t_nc + 2ζ·lse_n,  k_nc = 1 − (s_nc/cap)²  (1 without a cap)

with g_n = ∂L/∂loss_n, where L is the number that is differentiated in the end, and dx = ∂L/∂x. With plain class indices
t is one-hot, A = k = 1, and this is the `p − 1 at the target` of a first course: the seven steps between the logits and
the loss (max, subtract, exp, sum, reciprocal, multiply, log) all cancel into it (`fused_ops.steps` shows how). The loss
is linear in class probabilities, so their gradient is dy_nc = g_n·(1−ε)·w_c·(lse_n − s_nc).

lse is kept in two parts, the row's maximum m and log_z = log Σ exp(s − m), because their sum would round: beside
logits of 1e4 a float32 keeps three digits of a log_z of 0.7, beside 1e8 none. Always lse − s = log_z − (s − m).

Logits of D positions an example, (N, C, D), are N·D such rows, taken as they lie: the classes of a row D apart.

If the loss is one number, its gradient is that for dloss = 1 times dloss. So the forward pass makes it while a row is
in cache, and the backward pass multiplies (`cross_entropy_loss.py`). Otherwise (reduction "none"; float16, in which it
may vanish unless dloss, a loss scale, multiplies it first; a second backward pass; second derivatives) the backward
pass starts from the logits.

Reductions: "none" returns loss_n; "sum" adds them; "mean" divides the sum by Σ w_y over the rows kept (class indices)
or by N (class probabilities), as `torch.nn.functional.cross_entropy` does. Rows whose y is `ignore_index` have loss 0.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from fused_ops._op import (
    accumulate_dtype,
    batch_first,
    below_autograd,
    define,
    differentiable,
    directly,
    looped,
    save,
)
from fused_ops.ops._logits import as_rows, like_logits, refuse_by_weight, target_rows
from fused_ops.ops.cross_entropy_derivatives import (
    RowDerivatives,
    class_targets,
    dense_targets,
    mean_weights,
    reduced,
    row_gradient,
    softcapped,
)


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
) -> Tuple[Tensor, Tensor, Tensor]:
    """loss_n = Σ_c t_nc·(lse_n − s_nc) + ζ·lse_n², and 0 where y = ignore_index.

    Returns loss, () or (N,); stats = (m, log_z), (2, N); and the divisor of the mean, (): all in the accumulate dtype.
    """
    x, y = as_rows(logits).to(accumulate_dtype(logits.dtype)), target_rows(target)  # (N, C); (N) or (N, C)
    s, _ = softcapped(x, softcap)  # (N, C)
    # m cancels out of all that follows: no derivative passes through it
    m = s.detach().amax(1, keepdim=True) if s.shape[1] else s.new_full((s.shape[0], 1), -torch.inf)  # (N, 1)
    log_z = (s - m).exp().sum(1, keepdim=True).log()  # (N, 1)
    neg_logp = log_z - (s - m)  # (N, C)

    t, kept = dense_targets(y, weight, ignore_index, label_smoothing, x)  # (N, C), (N, 1)
    if y.is_floating_point() or label_smoothing > 0:
        losses = (t * neg_logp).sum(1)  # (N)
    else:  # not the same as the sum above: 0·inf, where a logit is -inf, is not 0
        at = class_targets(y, t.new_ones(t.shape[1]), ignore_index)[0][:, None]  # (N, 1)
        losses = (t.gather(1, at) * neg_logp.gather(1, at))[:, 0]  # (N)
    if z_loss:
        losses = losses + z_loss * (m + log_z).square()[:, 0]  # (N)
    losses = losses.where(kept[:, 0], 0)  # (N)

    divisor = mean_weights(y, weight, ignore_index, x.dtype).sum()  # ()
    stats = torch.cat((m, log_z), 1).t().contiguous()  # (2, N)
    return reduced(losses, reduction, divisor), stats, divisor  # () or (N), (2, N), ()


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    stats: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
    needs_logits: bool,
    needs_target: bool,
) -> Tuple[Tensor, Tensor]:
    """dx_nc = g_n·(A_n·p_nc − t_nc)·k_nc, with A_n = Σ_c t_nc + 2ζ·lse_n; and dy_nc = g_n·(1−ε)·w_c·(lse_n − s_nc).

    g_n is dloss_n ("none"), dloss ("sum") or dloss / divisor ("mean"), and 0 in the rows that are ignored: so a mean
    over ignored rows alone is 0/0 = NaN, with the gradient 0. Returns dlogits and dtarget, contiguous, of the shapes
    and dtypes of logits and target; (0,) for one that isn't needed.
    """
    x, y = as_rows(logits).to(stats.dtype), target_rows(target)  # (N, C); (N) or (N, C)
    m, log_z = stats.unsqueeze(2)  # (N, 1) each
    s, k = softcapped(x, softcap)  # (N, C); (N, C) or 1
    neg_logp = log_z - (s - m)  # (N, C)
    g = row_gradient(dloss.to(x.dtype), reduction, divisor, x.shape[0])  # (N, 1)
    dlogits, dtarget = logits.new_empty(0), logits.new_empty(0)
    if needs_logits:
        p = (-neg_logp).exp()  # (N, C)
        t, kept = dense_targets(y, weight, ignore_index, label_smoothing, x)  # (N, C), (N, 1)
        A = t.sum(1, keepdim=True) + 2 * z_loss * (m + log_z)  # (N, 1)
        dx = torch.where(kept, g * (A * p - t) * k, 0)  # (N, C)
        dlogits = like_logits(dx, logits).to(logits.dtype).contiguous()
    if needs_target:
        dy = g * (1 - label_smoothing) * neg_logp  # (N, C)
        dy = dy if weight is None else weight.to(x.dtype) * dy  # (N, C)
        dtarget = like_logits(dy, logits).to(target.dtype).contiguous()
    return dlogits, dtarget


def cross_entropy_backward_(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    stats: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: Optional[float],
    needs_target: bool,
) -> Tensor:
    """As `cross_entropy_backward`, with dlogits written over the logits, which are contiguous. Returns dtarget."""
    options = ignore_index, reduction, label_smoothing, z_loss, softcap
    dlogits, dtarget = cross_entropy_backward(
        dloss, logits, target, weight, stats, divisor, *options, True, needs_target
    )
    logits.copy_(dlogits)
    return dtarget


forward_op, _backward_op = define(cross_entropy_forward), define(cross_entropy_backward)
backward_op_ = directly(define(cross_entropy_backward_, mutates_args=("logits",)))


class CrossEntropy(torch.autograd.Function):
    """Differentiable by the logits and by class probabilities. Two more outputs are what the backward pass needs."""

    forward = below_autograd(forward_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options = inputs
        _, stats, divisor = output
        ctx.mark_non_differentiable(stats, divisor)
        ctx.set_materialize_grads(False)
        save(ctx, logits, target, weight, stats, divisor)

    @staticmethod
    def backward(ctx, dloss, *_):
        refuse_by_weight(ctx.needs_input_grad[2])
        if dloss is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[:2]
        dlogits, dtarget = gradients_of_rows(dloss, *ctx.saved_tensors, *ctx.options, *needs)
        return dlogits if needs[0] else None, dtarget if needs[1] else None, *(None,) * 6

    @staticmethod
    def jvp(ctx, logits_t, target_t, weight_t, *_):
        refuse_by_weight(weight_t is not None)
        logits, target, weight, _, divisor = ctx.saved_tensors
        ignore_index, reduction, *smooth = ctx.options
        along = RowDerivatives(logits, target, weight, ignore_index, *smooth).loss_along(logits_t, target_t)  # (N)
        return reduced(along, reduction, divisor), None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, weight, ignore_index, reduction, *smooth):
        """A batch of batches is one batch of rows, whose losses are then reduced batch by batch."""
        if in_dims[2] is not None:
            args = logits, target, weight, ignore_index, reduction, *smooth
            return looped(CrossEntropy.apply, info, in_dims, args)
        B = info.batch_size
        logits, target = (batch_first(t, dim, B) for t, dim in zip((logits, target), in_dims, strict=False))
        rows = logits.flatten(0, 1), target.flatten(0, 1)
        losses, stats, _ = CrossEntropy.apply(*rows, weight, ignore_index, "none", *smooth)
        losses = losses.view(B, -1)  # (B, N)
        N = losses.shape[1]
        divisors = mean_weights(target_rows(rows[1]), weight, ignore_index, losses.dtype).view(B, N).sum(1)  # (B)
        if reduction != "none":
            losses = losses.sum(1) / (divisors if reduction == "mean" else 1)  # (B)
        return (losses, stats.view(2, B, N), divisors), (0, 1, 0)


class CrossEntropyBackward(torch.autograd.Function):
    """dlogits and dtarget, differentiable by dloss, logits and target."""

    forward = below_autograd(_backward_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.needs = inputs[6:11], inputs[11:]
        ctx.set_materialize_grads(False)
        save(ctx, *inputs[:6])

    @staticmethod
    def backward(ctx, v, u):
        """By symmetry: along (v, u), the loss's change comes back to dloss, that of the gradients to their tensors."""
        refuse_by_weight(ctx.needs_input_grad[3])
        dloss, logits, target, weight, stats, divisor = ctx.saved_tensors
        ignore_index, reduction, *smooth = ctx.options
        v, u = (t if needed else None for t, needed in zip((v, u), ctx.needs, strict=True))
        row = RowDerivatives(logits, target, weight, ignore_index, *smooth)
        to_dloss = to_logits = to_target = None
        if ctx.needs_input_grad[0]:
            to_dloss = reduced(row.loss_along(v, u), reduction, divisor)
        if any(ctx.needs_input_grad[1:3]):
            to_logits, to_target = row.gradients_along(v, u, row_gradient(dloss, reduction, divisor, stats.shape[1]))
        return to_dloss, to_logits, to_target if ctx.needs_input_grad[2] else None, *[None] * 10

    @staticmethod
    def jvp(ctx, dloss_t, logits_t, target_t, weight_t, *_):
        refuse_by_weight(weight_t is not None)
        dloss, logits, target, weight, stats, divisor = ctx.saved_tensors
        ignore_index, reduction, *smooth = ctx.options
        row = RowDerivatives(logits, target, weight, ignore_index, *smooth)
        g = row_gradient(dloss, reduction, divisor, stats.shape[1])  # (N, 1)
        tangents = row.gradients_along(logits_t, target_t, g)  # (N, C) each
        if dloss_t is not None:
            saved = logits, target, weight, stats, divisor
            more = gradients_of_rows(dloss_t, *saved, *ctx.options, *ctx.needs)
            tangents = [t + m if needed else t for t, m, needed in zip(tangents, more, ctx.needs, strict=True)]
        return tuple(t if needed else t.new_zeros(0) for t, needed in zip(tangents, ctx.needs, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        if in_dims[3] is not None:
            return looped(gradients_of_rows, info, in_dims, args)
        B = info.batch_size
        _, _, _, weight, _, _, ignore_index, reduction, *options = args
        # (B) or (B, N), (B, N, C), (B, N) or (B, N, C), (B, 2, N), (B)
        dloss, logits, target, stats, divisor = (batch_first(args[i], in_dims[i], B) for i in (0, 1, 2, 4, 5))
        N = stats.shape[2]
        g = dloss / divisor if reduction == "mean" else dloss  # (B) or (B, N)
        g = g.view(B, -1).expand(B, N).flatten()  # (B·N)
        rows = logits.flatten(0, 1), target.flatten(0, 1), weight, stats.transpose(0, 1).flatten(1)
        gradients = gradients_of_rows(g, *rows, divisor[0], ignore_index, "none", *options)
        return tuple(t.unflatten(0, (B, -1)) if t.dim() > 1 else t.expand(B, 0) for t in gradients), (0, 0)


loss_of_rows = differentiable(forward_op, CrossEntropy, results=1)
gradients_of_rows = differentiable(_backward_op, CrossEntropyBackward)
