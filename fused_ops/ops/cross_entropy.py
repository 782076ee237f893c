"""Cross-entropy, from logits to loss in one op and back in another.

    N  rows (examples)          x   logits, (N, C)
    C  classes                  y   target classes, (N,), or target probabilities, (N, C)
    w  class weights, (C,)      ε   label_smoothing
    ζ  z_loss                   cap softcap

The logits may first be capped smoothly, s = cap·tanh(x/cap), or s = x. Every form of the loss is then a weighted sum of
−log-probabilities, and perhaps a penalty that keeps the log-sum-exp near zero,

    loss_n = Σ_c t_nc·(lse_n − s_nc) + ζ·lse_n²          lse_n = log Σ_c exp(s_nc)

and only the weights t differ:

    class indices            t_nc = (1−ε)·w_y·[c = y_n] + (ε/C)·w_c
    class probabilities      t_nc = w_c·((1−ε)·y_nc + ε/C)

Softmax is the gradient of lse: ∂lse/∂s_c = exp(s_c − lse) = p_c. And tanh' = 1 − tanh². So one line serves every form,

    dx_nc = g_n·(A_n·p_nc − t_nc)·k_nc          A_n = Σ_c t_nc + 2ζ·lse_n,  k_nc = 1 − (s_nc/cap)²  (1 without a cap)

with g_n = ∂L/∂loss_n. With plain class indices t is one-hot, A = k = 1, and this is the `p − 1 at the target` of a
first course: the seven steps between the logits and the loss (max, subtract, exp, sum, reciprocal, multiply, log) all
cancel into it. The loss is linear in class probabilities, so their gradient is dy_nc = g_n·(1−ε)·w_c·(lse_n − s_nc).

lse is kept in two parts, the row's maximum m and log_z = log Σ exp(s − m), because their sum would round: beside
logits of 1e4 a float32 has no digits left for a log_z of 0.7. Always lse − s = log_z − (s − m).

Logits of D positions an example, (N, C, D), are N·D such rows, taken as they lie: the classes of a row D apart.

If the loss is one number, its gradient is that for dloss = 1 times dloss. So the forward pass makes it while a row is
in cache, and the backward pass multiplies. Otherwise (reduction "none", float16, which might need dloss to hold it, a
second backward pass, second derivatives) the backward pass starts from the logits.

Reductions: "none" returns loss_n; "sum" adds them; "mean" divides the sum by Σ w_y over the rows kept (class indices)
or by N (class probabilities), as `torch.nn.functional.cross_entropy` does. Rows whose y is `ignore_index` have loss 0.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.nn import _reduction as legacy_reduction

from fused_ops._op import (
    accumulate_dtype,
    applied,
    batch_first,
    below_autograd,
    define,
    differentiable,
    directly,
    looped,
    save,
)
from fused_ops.ops._logits import (
    as_batch,
    as_rows,
    check_loss,
    in_dtype,
    in_forward_pass,
    is_final_backward,
    like_logits,
    target_rows,
    without_classes,
)
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
    needs_logits: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss_n = Σ_c t_nc·(lse_n − s_nc) + ζ·lse_n², and 0 where y = ignore_index.

    Returns loss, () or (N,); stats = (m, log_z), (2, N); and the divisor of the mean, (): all in the accumulate dtype.
    And dlogits for dloss = 1, contiguous, of the shape and dtype of logits; (0,) if it isn't needed.
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
    loss, stats = reduced(losses, reduction, divisor), torch.cat((m, log_z), 1).t().contiguous()  # () or (N), (2, N)
    dlogits = logits.new_empty(0)  # (0)
    if needs_logits:
        saved = logits, target, weight, stats, divisor
        options = ignore_index, reduction, label_smoothing, z_loss, softcap
        dlogits, _ = cross_entropy_backward(torch.ones_like(loss), *saved, *options, True, False)
    return loss, stats, divisor, dlogits


def cross_entropy_scale_(dlogits: Tensor, dloss: Tensor, target: Tensor, ignore_index: int) -> None:
    """dlogits for dloss from those for dloss = 1, in place; the rows that are ignored stay 0, whatever dloss is."""
    dx = as_rows(dlogits) * dloss.to(dlogits.dtype)  # (N, C)
    if not target.is_floating_point():
        dx = dx.where((target != ignore_index)[:, None], 0)  # (N, C)
    dlogits.copy_(like_logits(dx, dlogits))


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

    g_n is dloss_n ("none"), dloss ("sum") or dloss / divisor ("mean"), and 0 in the rows that are ignored: so a batch
    of ignored rows has the loss 0/0 = NaN and the gradient 0. Returns dlogits and dtarget, contiguous, of the shapes
    and dtypes of logits and target; (0,) for one that isn't needed.
    """
    x, y = as_rows(logits).to(stats.dtype), target_rows(target)  # (N, C); (N) or (N, C)
    m, log_z = stats.unsqueeze(2)  # (N, 1) each
    s, k = softcapped(x, softcap)  # (N, C) each
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
_scale_ = directly(define(cross_entropy_scale_, mutates_args=("dlogits",)))
backward_op_ = directly(define(cross_entropy_backward_, mutates_args=("logits",)))


class CrossEntropy(torch.autograd.Function):
    """Differentiable by the logits and by class probabilities. Three more outputs are what the backward pass needs."""

    forward = below_autograd(forward_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options, made = inputs
        _, stats, divisor, dlogits = output
        ctx.dlogits = dlogits if made else None
        ctx.mark_non_differentiable(stats, divisor, dlogits)
        ctx.set_materialize_grads(False)
        save(ctx, logits, target, weight, stats, divisor)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 9
        needs = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors  # raises if somebody has changed the logits
        if ctx.dlogits is not None and not needs[1] and is_final_backward(dloss):
            (dlogits, ctx.dlogits), dtarget = (ctx.dlogits, None), None  # taken by the first backward pass alone
            _scale_(dlogits, dloss, saved[1], ctx.options[0])
        else:
            dlogits, dtarget = _cross_entropy_backward(dloss, *saved, *ctx.options, *needs)
        return dlogits if needs[0] else None, dtarget if needs[1] else None, *(None,) * 7

    @staticmethod
    def jvp(ctx, logits_t, target_t, *_):
        logits, target, weight, _, divisor = ctx.saved_tensors
        ignore_index, reduction, *smooth = ctx.options
        along = RowDerivatives(logits, target, weight, ignore_index, *smooth).loss_along(logits_t, target_t)  # (N)
        return reduced(along, reduction, divisor), None, None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, weight, ignore_index, reduction, *others):
        """A batch of batches is one batch of rows, whose losses are then reduced batch by batch."""
        *smooth, _ = others
        if in_dims[2] is not None:
            args = logits, target, weight, ignore_index, reduction, *smooth, False
            return looped(CrossEntropy.apply, info, in_dims, args)
        B = info.batch_size
        logits, target = (batch_first(t, dim, B) for t, dim in zip((logits, target), in_dims, strict=False))
        rows = logits.flatten(0, 1), target.flatten(0, 1)
        losses, stats, _, dlogits = CrossEntropy.apply(*rows, weight, ignore_index, "none", *smooth, False)
        losses = losses.view(B, -1)  # (B, N)
        N = losses.shape[1]
        divisors = mean_weights(rows[1], weight, ignore_index, losses.dtype).view(B, N).sum(1)  # (B)
        if reduction != "none":
            losses = losses.sum(1) / (divisors if reduction == "mean" else 1)  # (B)
        return (losses, stats.view(2, B, N), divisors, dlogits.expand(B, 0)), (0, 1, 0, 0)


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
    def jvp(ctx, dloss_t, logits_t, target_t, *_):
        dloss, logits, target, weight, stats, divisor = ctx.saved_tensors
        ignore_index, reduction, *smooth = ctx.options
        row = RowDerivatives(logits, target, weight, ignore_index, *smooth)
        g = row_gradient(dloss, reduction, divisor, stats.shape[1])  # (N, 1)
        tangents = row.gradients_along(logits_t, target_t, g)  # (N, C) each
        if dloss_t is not None:
            saved = logits, target, weight, stats, divisor
            more = _cross_entropy_backward(dloss_t, *saved, *ctx.options, *ctx.needs)
            tangents = [t + m if needed else t for t, m, needed in zip(tangents, more, ctx.needs, strict=True)]
        return tuple(t if needed else t.new_zeros(0) for t, needed in zip(tangents, ctx.needs, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        if in_dims[3] is not None:
            return looped(_cross_entropy_backward, info, in_dims, args)
        B = info.batch_size
        _, _, _, weight, _, _, ignore_index, reduction, *options = args
        # (B) or (B, N), (B, N, C), (B, N) or (B, N, C), (B, 2, N), (B)
        dloss, logits, target, stats, divisor = (batch_first(args[i], in_dims[i], B) for i in (0, 1, 2, 4, 5))
        N = stats.shape[2]
        g = dloss / divisor if reduction == "mean" else dloss  # (B) or (B, N)
        g = g.view(B, -1).expand(B, N).flatten()  # (B·N)
        rows = logits.flatten(0, 1), target.flatten(0, 1), weight, stats.transpose(0, 1).flatten(1)
        gradients = _cross_entropy_backward(g, *rows, divisor[0], ignore_index, "none", *options)
        return tuple(t.unflatten(0, (B, -1)) if t.dim() > 1 else t.expand(B, 0) for t in gradients), (0, 0)


class InplaceCrossEntropy(CrossEntropy):
    """Cross-entropy whose backward pass writes the gradient over the logits."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        CrossEntropy.setup_context(ctx, inputs, output)
        ctx.spent = False

    @staticmethod
    def backward(ctx, dloss, *_):
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy(inplace_grad=True) has no second derivative: use inplace_grad=False")
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy(inplace_grad=True): a second backward pass is not possible, "
                "because the first one has written the gradient over the logits. Use inplace_grad=False"
            )
        if dloss is None:
            return (None,) * 9
        logits, *saved = ctx.saved_tensors  # raises if somebody else has changed the logits
        ctx.spent = True
        dtarget = backward_op_(dloss, logits, *saved, *ctx.options, ctx.needs_input_grad[1])
        torch.autograd.graph.increment_version(logits)  # so that whoever needs the logits as they were is told
        return logits.detach(), dtarget if ctx.needs_input_grad[1] else None, *(None,) * 7

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("cross_entropy(inplace_grad=True) has no forward mode: use inplace_grad=False")

    @staticmethod
    def vmap(info, in_dims, *_):
        raise RuntimeError("cross_entropy(inplace_grad=True) cannot be vmapped: use inplace_grad=False")


_cross_entropy = differentiable(forward_op, CrossEntropy, results=1)
_inplace_cross_entropy = applied(InplaceCrossEntropy, results=1)
_cross_entropy_backward = differentiable(_backward_op, CrossEntropyBackward)


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    *,
    z_loss=0.0,
    softcap=None,
    inplace_grad=False,
):
    """Cross-entropy between logits and targets: a drop-in for `torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, d2, ...); float32, float64, float16 or bfloat16 (16-bit types are
            summed in float32).
        target: class indices, int64 or uint8, of the shape of `input` without C, each in [0, C) or `ignore_index`;
            or class probabilities, floating point, of the shape of `input`, differentiable.
        weight: a weight for each class, (C,), of the dtype of `input`. Not differentiable.
        size_average, reduce: PyTorch's deprecated spellings of `reduction`.
        ignore_index: the class index whose rows add nothing to the loss and get a zero gradient.
        reduction: "mean" (over the weights of the targets; over the rows for probabilities), "sum" or "none".
        label_smoothing: ε in [0, 1], the share of each target that is spread evenly over the classes.
        z_loss: ζ; adds ζ·lse² to the loss of each row that is kept, before the reduction.
        softcap: cap > 0; replaces the logits x by cap·tanh(x/cap).
        inplace_grad: let the gradient take the storage of the logits in the backward pass, which saves its memory (a
            copy of the logits does, where they are not contiguous rows of classes). There are no second derivatives
            then, and the logits are gone. torch.compile, which plans memory itself, passes over it. Otherwise, where
            the logits require a gradient and the reduction is not "none", the loss holds it, too, as large as the
            logits, until its backward pass hands it on; under `torch.no_grad` it is not made.

    Returns:
        The loss, in nats: () or, for "none", of the shape of `input` without C; of the dtype of `input` or, under
        autocast, float32.

    Raises:
        IndexError: a class index out of range (RuntimeError where the reference runs).
        ValueError: batch sizes that differ, an unknown reduction, or a softcap that is not positive.
        RuntimeError: other shapes or dtypes that don't fit together, and a weight that requires a gradient. With
            inplace_grad: a second backward pass, a second derivative, forward mode or vmap, and a backward pass of
            whoever else needed the logits.

    Source: derived at the head of `fused_ops/ops/cross_entropy.py`; label smoothing after Szegedy et al. 2016, z-loss
    after Chowdhery et al. 2022 (PaLM), softcap after Gemma Team 2024.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction.legacy_get_string(size_average, reduce)
    shape, dtype = input.shape, input.dtype
    if not shape or not dtype.is_floating_point:
        raise RuntimeError(
            f"expected floating point logits of shape (C,), (N, C) or (N, C, d1, ...), "
            f"got {dtype} of shape {tuple(shape)}"
        )
    check_loss(shape, dtype, target, weight, ignore_index, reduction, label_smoothing, softcap)

    logits = as_batch(input)  # (N, C) or (N, C, D)
    if target.is_floating_point():
        y = as_rows(target) if logits.dim() == 2 else target.flatten(2)  # as logits
        dtype = torch.promote_types(dtype, target.dtype)
        logits, y = logits.to(dtype), y.to(dtype)
    else:
        y = target if target.dim() == 1 and target.dtype == torch.int64 else target.reshape(-1).long()  # (N) or (N·D)
    options = ignore_index, reduction, label_smoothing, z_loss, softcap
    if inplace_grad and not torch.compiler.is_compiling():
        (loss,) = _inplace_cross_entropy(logits.contiguous(), y, weight, *options, False)
    else:
        made = logits.requires_grad and not y.requires_grad and in_forward_pass(reduction, dtype)
        (loss,) = _cross_entropy(logits, y, weight, *options, made and not torch.compiler.is_compiling())
    loss = in_dtype(loss, dtype)
    return loss.reshape(without_classes(shape)) if reduction == "none" else loss
