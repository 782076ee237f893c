"""What `torch.utils.flop_counter.FlopCounterMode` is told of our ops: the FLOPs of their matrix products, as PyTorch
counts its own. Other ops have none."""

import torch
from torch.utils.flop_counter import register_flop_formula

from fused_ops import functional  # noqa: F401  (which declares the ops)

OPS = torch.ops.fused_ops


@register_flop_formula(OPS.linear_cross_entropy_forward)
def linear_cross_entropy_forward(input, linear_weight, *others, out_shape=None):
    """z = x·Wᵀ and, of the gradients that are needed, dx = dz·W and dW = dzᵀ·x."""
    (N, H), (outputs, _) = input, linear_weight
    *_, needs = others
    return 2 * N * H * outputs * (1 + sum(needs[:2]))


@register_flop_formula(OPS.linear_cross_entropy_backward)
def linear_cross_entropy_backward(_dloss, *args, out_shape=None):
    """The same: the logits are worked out once more."""
    return linear_cross_entropy_forward(*args)


def _network(N, W1, W2, passes):
    (H, F), (V, _) = W1, W2
    return 2 * N * H * (F + V) * passes


@register_flop_formula(OPS.mlp_loss_and_gradients)
def mlp_loss_and_gradients(X, Y, C, W1, b1, bngain, bnbias, W2, *others, out_shape=None):
    """Both products forward and, if there are gradients, twice these back."""
    *_, needs_gradients = others
    return _network(X[0], W1, W2, 3 if needs_gradients else 1)


@register_flop_formula(OPS.mlp_sgd_steps_)
def mlp_sgd_steps_(X, Y, ix, C, W1, b1, bngain, bnbias, W2, *others, out_shape=None):
    """The same for each of K minibatches of N."""
    K, N = ix
    return _network(K * N, W1, W2, 3)
