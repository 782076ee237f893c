"""The lecture's whole network as one op: forward, loss and hand-written backward in one call, and training in another.

    N  examples                     X  their contexts, (N, T) indices of characters   T  characters a context
    V  characters                   Y  the characters that follow, (N,)               E  embedding size
    H  hidden units                 μ, r  mean and (variance + eps)^-½ of each unit   F  T·E: what W1 sees

    embcat  = the rows of C that X names, side by side                 C  (V, E)
    hprebn  = embcat·W1ᵀ + b1                                          W1 (H, F), b1 (H,)
    h       = tanh(bngain·bnraw + bnbias)     bnraw = (hprebn − μ)·r   bngain, bnbias (H,)
    logits  = h·W2ᵀ + b2                                               W2 (V, H), b2 (V,)
    loss    = mean over n of lse(logits_n) − logits_n[Y_n]

Every gradient below is one that the ladder has taken before: those of the products and of the embedding are steps of
`fused_ops.steps`, those of the loss and of batch norm come in one go, from `cross_entropy` and `batch_norm`. The
weights lie as in `torch.nn.Linear`, transposed beside the lecture's.

The loss is one number, so a backward pass only multiplies its gradients for dloss = 1. The op makes them along with the
loss, while what they need is in cache, and keeps nothing else.
"""

import functools
from typing import Optional, Tuple

import torch
from torch import Tensor, is_grad_enabled

from fused_ops._op import (
    REFERENCES,
    accumulate_dtype,
    below_autograd,
    define,
    differentiable,
    is_autocast_enabled,
    looped,
    overridable,
    refuse_derivative,
    save,
    transforms_active,
)


def mlp_loss_and_gradients(
    X: Tensor,
    Y: Tensor,
    C: Tensor,
    W1: Tensor,
    b1: Tensor,
    bngain: Tensor,
    bnbias: Tensor,
    W2: Tensor,
    b2: Tensor,
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
    needs_gradients: bool,
) -> Tuple[Tensor, Tensor]:
    """The loss, and back from it through the network, for dloss = 1:

        dlogits = (softmax(logits) − one-hot(Y)) / N
        dW2 = dlogitsᵀ·h        db2 = Σ_n dlogits        dh = dlogits·W2
        dhpreact = dh·(1 − h²)
        dbngain = Σ_n dhpreact·bnraw        dbnbias = Σ_n dhpreact
        dhprebn = bngain·r·(dhpreact − mean(dhpreact) − bnraw·mean(dhpreact·bnraw))
        dW1 = dhprebnᵀ·embcat   db1 = Σ_n dhprebn        dembcat = dhprebn·W1
        dC[k] = Σ dembcat over the places where X is k

    In evaluation μ and r come from the running statistics, which are constants, and dhprebn = bngain·r·dhpreact. In
    training the running statistics move as in `batch_norm`.

    Returns loss, (), and dC, dW1, db1, dbngain, dbnbias, dW2 and db2 one after the other, (P,), or (0,) if they are not
    needed: both in the accumulate dtype.
    """
    dtype = accumulate_dtype(C.dtype)
    C, W1, b1, bngain, bnbias, W2, b2 = (p.to(dtype) for p in (C, W1, b1, bngain, bnbias, W2, b2))
    N = X.shape[0]
    embcat = C[X].flatten(1)  # (N, F)
    hprebn = embcat @ W1.t() + b1  # (N, H)
    if training:
        mean = hprebn.mean(0)  # (H)
        var = (hprebn - mean).square().mean(0)  # (H), biased
        if running_mean is not None:
            running_mean.copy_((1 - momentum) * running_mean.to(dtype) + momentum * mean.detach())
            unbiased_var = var.detach() * (N / (N - 1))  # (H)
            running_var.copy_((1 - momentum) * running_var.to(dtype) + momentum * unbiased_var)
    else:
        mean, var = running_mean.to(dtype), running_var.to(dtype)  # (H)
    r = (var + eps) ** -0.5  # (H)
    bnraw = (hprebn - mean) * r  # (N, H)
    h = torch.tanh(bngain * bnraw + bnbias)  # (N, H)
    logits = h @ W2.t() + b2  # (N, V)
    logprobs = torch.log_softmax(logits, 1)  # (N, V)
    loss = -logprobs.gather(1, Y[:, None]).mean()  # ()
    if not needs_gradients:
        return loss, loss.new_empty(0)

    one_hot = torch.zeros_like(logprobs).scatter(1, Y[:, None], 1)  # (N, V)
    dlogits = (logprobs.exp() - one_hot) / N  # (N, V)
    dW2 = dlogits.t() @ h  # (V, H)
    db2 = dlogits.sum(0)  # (V)
    dh = dlogits @ W2  # (N, H)
    dhpreact = dh * (1 - h.square())  # (N, H)
    dbngain = (dhpreact * bnraw).sum(0)  # (H)
    dbnbias = dhpreact.sum(0)  # (H)
    left = dhpreact  # (N, H): in training less its mean and its part along bnraw
    if training:
        left = dhpreact - dbnbias / N - bnraw * (dbngain / N)  # (N, H)
    dhprebn = bngain * r * left  # (N, H)
    dW1 = dhprebn.t() @ embcat  # (H, F)
    db1 = dhprebn.sum(0)  # (H)
    demb = (dhprebn @ W1).view(-1, C.shape[1])  # (N·T, E)
    dC = torch.zeros_like(C).index_add(0, X.flatten(), demb)  # (V, E)
    return loss, torch.cat([d.flatten() for d in (dC, dW1, db1, dbngain, dbnbias, dW2, db2)])  # (), (P)


def as_parameters(gradients, parameters):
    """Views of the gradients (P,), of the shapes of the parameters."""
    parts = gradients.split_with_sizes([p.numel() for p in parameters])
    return [part if p.dim() == 1 else part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def mlp_sgd_steps_(
    X: Tensor,
    Y: Tensor,
    ix: Tensor,
    C: Tensor,
    W1: Tensor,
    b1: Tensor,
    bngain: Tensor,
    bnbias: Tensor,
    W2: Tensor,
    b2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    lr: float,
    momentum: float,
    eps: float,
) -> Tensor:
    """Gradient descent, p ← p − lr·dp, on one minibatch after the other: row k of ix, (K, N), says which rows it takes.

    Moves the parameters and the running statistics in place. Returns the loss of each minibatch, (K,), in the
    accumulate dtype.
    """
    parameters = C, W1, b1, bngain, bnbias, W2, b2
    statistics = running_mean, running_var
    losses = []
    for rows in ix:
        loss, gradients = mlp_loss_and_gradients(X[rows], Y[rows], *parameters, *statistics, True, momentum, eps, True)
        for p, dp in zip(parameters, as_parameters(gradients, parameters), strict=True):
            p -= lr * dp
        losses.append(loss)
    return torch.stack(losses)  # (K)


def _define(reference, mutates_args):
    """The op; and its reference once more, as <name>_by_reference, which no kernel hides.

    To it the CUDA kernel, which works in the shared memory of one block, leaves what does not fit there.
    """

    @functools.wraps(reference)
    def by_reference(*args):
        return reference(*args)

    by_reference.__name__ += "_by_reference"
    define(by_reference, mutates_args)
    return define(reference, mutates_args)


_op = _define(mlp_loss_and_gradients, mutates_args=("running_mean", "running_var"))
_sgd_steps_op = _define(
    mlp_sgd_steps_,
    mutates_args=("C", "W1", "b1", "bngain", "bnbias", "W2", "b2", "running_mean", "running_var"),
)


class MLP(torch.autograd.Function):
    """Differentiable by the parameters. Its second output holds their gradients for dloss = 1, if asked for."""

    forward = below_autograd(_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, running_mean, running_var, training, momentum, eps, needs_gradients = inputs
        _, gradients = output
        ctx.gradients = gradients if needs_gradients else None
        ctx.options = training, momentum, eps
        ctx.mark_non_differentiable(gradients)
        ctx.set_materialize_grads(False)
        statistics = (None, None) if training else (running_mean, running_var)  # what the loss depends on
        save(ctx, *tensors, *statistics)

    @staticmethod
    def backward(ctx, dloss, *_):
        refuse_derivative(any(ctx.needs_input_grad[9:11]), "mlp", "running_mean or running_var")
        if dloss is None:
            return (None,) * 15
        if ctx.gradients is None or is_grad_enabled() or transforms_active():
            gradients = _gradients(ctx)
        else:
            gradients = ctx.gradients
        gradients = as_parameters(dloss * gradients, ctx.saved_tensors[2:9])
        asked = zip(gradients, ctx.needs_input_grad[2:], strict=False)
        return None, None, *(g if needed else None for g, needed in asked), *[None] * 6

    @staticmethod
    def jvp(ctx, _X, _Y, *tangents):
        *of_parameters, mean_t, var_t, _training, _momentum, _eps, _needs_gradients = tangents
        refuse_derivative(mean_t is not None or var_t is not None, "mlp", "running_mean or running_var")
        gradients = as_parameters(_gradients(ctx), ctx.saved_tensors[2:9])
        moved = zip(gradients, of_parameters, strict=True)
        return sum((g * t.to(g.dtype)).sum() for g, t in moved if t is not None), None

    @staticmethod
    def vmap(info, in_dims, *args):
        *_, running_mean, _, training, _, _, _ = args
        if training and running_mean is not None:
            raise RuntimeError("mlp under vmap cannot move running statistics: a batch of batches has no one mean")
        return looped(MLP.apply, info, in_dims, args)


def _gradients(ctx):
    """The gradients for dloss = 1 as differentiable functions of what they depend on: the reference's own steps."""
    _, gradients = REFERENCES[_op](*ctx.saved_tensors, *ctx.options, True)
    return gradients


_mlp = differentiable(_op, MLP, results=1)


@overridable
def mlp(
    input,
    target,
    embedding_weight,
    weight1,
    bias1,
    norm_weight,
    norm_bias,
    weight2,
    bias2,
    running_mean=None,
    running_var=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """The mean cross-entropy of embedding, linear layer, batch norm, tanh and linear layer, in one op.

    Where a gradient is needed it is made along with the loss; the backward pass multiplies it by the loss's own. Second
    and higher derivatives, and forward mode, take PyTorch's ops through the same formulas. It computes in float32
    (float64 for float64), under autocast, too, and runs on one device. Made for networks that stay in cache.

    On CUDA one block of threads does it all in its shared memory, if that has room: the lecture's network in float32
    takes 138 KiB of an A100's 163 or an H100's 227. What does not fit, as on cards with 99, takes PyTorch's ops one by
    one.

    Args:
        input: contexts, (N, T), int64, each in [0, V).
        target: the classes that follow, (N,), int64, each in [0, V).
        embedding_weight: C, (V, E); float32, float64, float16 or bfloat16, the dtype of all parameters.
        weight1, bias1: W1 (H, T·E) and b1 (H,), of the first linear layer.
        norm_weight, norm_bias: bngain and bnbias, (H,).
        weight2, bias2: W2 (V, H) and b2 (V,), of the second linear layer.
        running_mean, running_var: (H,), both or neither; read in evaluation, moved in place in training.
        training, momentum, eps: as in `batch_norm`.

    Returns:
        The loss, in nats: (), of the dtype of the parameters.

    Raises:
        IndexError: an index out of range (RuntimeError or IndexError where the reference runs). On CUDA the device
            stops, as with PyTorch's own ops.
        ValueError: no example, or one in training, one running statistic without the other or none in evaluation.
        RuntimeError: shapes or dtypes that don't fit together.

    Source: Karpathy's "Becoming a backprop ninja" (makemore, part 4); derived at the head of `fused_ops/ops/mlp.py`.
    """
    parameters = embedding_weight, weight1, bias1, norm_weight, norm_bias, weight2, bias2
    _check(input, target, parameters, running_mean, running_var)
    if training and len(input) < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got {len(input)} examples")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var must be defined in evaluation mode")
    needs_gradients = is_grad_enabled() and any(p.requires_grad for p in parameters) and not transforms_active()
    arguments = input, target, *parameters, running_mean, running_var, training, momentum, eps, needs_gradients
    if is_autocast_enabled(input.device):
        with torch.autocast(input.device.type, enabled=False):
            (loss,) = _mlp(*arguments)
    else:
        (loss,) = _mlp(*arguments)
    return loss.to(embedding_weight.dtype)


def mlp_sgd_steps(
    input,
    target,
    embedding_weight,
    weight1,
    bias1,
    norm_weight,
    norm_bias,
    weight2,
    bias2,
    running_mean,
    running_var,
    *,
    lr,
    steps,
    batch_size,
    momentum=0.1,
    eps=1e-5,
    generator=None,
):
    """Train the network of `mlp` by stochastic gradient descent: all steps in one call, without Python in between.

    Each step takes a minibatch, forward, backward and p ← p − lr·dp, as `torch.optim.SGD` does. On CPU other threads of
    Python run meanwhile. On CUDA all steps are one kernel, if the network fits (see `mlp`), and the call does not wait
    for it. The parameters and running statistics are moved in place; autograd sees none of it. Those of 16 bits are
    rounded once, at the end, but by the reference at every step.

    Args:
        input, target, ..., running_var: as in `mlp`; all examples to draw from, input (M, T) and target (M,).
        lr: learning rate.
        steps: minibatches to train on, K.
        batch_size: examples a minibatch, at least 2, drawn with replacement.
        momentum, eps: of batch norm.
        generator: a `torch.Generator` on CPU to draw with: all of ix = randint(M, (K, batch_size)), the same numbers as
            in K draws of a minibatch each, whatever the device. The result depends on nothing else.

    Returns:
        The loss of each minibatch before its step, (K,), in nats, in float32 (float64 for float64).

    Raises:
        IndexError, RuntimeError: as `mlp`.
        ValueError: fewer than one step or two examples a minibatch.
    """
    parameters = embedding_weight, weight1, bias1, norm_weight, norm_bias, weight2, bias2
    _check(input, target, parameters, running_mean, running_var)
    if steps < 1 or batch_size < 2:
        raise ValueError(f"expected at least one step of at least two examples, got {steps} of {batch_size}")
    if running_mean is None:
        raise ValueError("running_mean and running_var must be defined")
    ix = torch.randint(0, len(input), (steps, batch_size), generator=generator).to(input.device)  # (K, N)
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        return _sgd_steps_op(input, target, ix, *parameters, running_mean, running_var, lr, momentum, eps)  # (K)


def _check(input, target, parameters, running_mean, running_var):
    C, W1, b1, bngain, bnbias, W2, b2 = parameters
    if input.dtype != torch.int64 or target.dtype != torch.int64 or input.dim() != 2 or target.shape != input.shape[:1]:
        raise RuntimeError(
            f"expected contexts (N, T) and targets (N,), int64, got {input.dtype} of {tuple(input.shape)} "
            f"and {target.dtype} of {tuple(target.shape)}"
        )
    if len(input) == 0:
        raise ValueError("expected at least one example")
    if C.dim() != 2 or W1.dim() != 2 or not C.is_floating_point():
        raise RuntimeError("expected floating point parameters, embedding_weight (V, E) and weight1 (H, T·E)")
    (V, E), H = C.shape, W1.shape[0]
    shapes = (V, E), (H, input.shape[1] * E), (H,), (H,), (H,), (V, H), (V,)
    names = "embedding_weight", "weight1", "bias1", "norm_weight", "norm_bias", "weight2", "bias2"
    for name, p, shape in zip(names, parameters, shapes, strict=True):
        if p.shape != shape or p.dtype != C.dtype:
            raise RuntimeError(f"expected {name} to be {shape} of {C.dtype}, got {tuple(p.shape)} of {p.dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name, t in {"running_mean": running_mean, "running_var": running_var}.items():
        if t is not None and (t.shape != (H,) or t.dtype not in (C.dtype, accumulate_dtype(C.dtype))):
            raise RuntimeError(f"expected {name} to be {(H,)} of {C.dtype}, got {tuple(t.shape)} of {t.dtype}")
