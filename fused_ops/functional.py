"""The public functions, with the positional signatures of their `torch.nn.functional` namesakes."""

from fused_ops.ops.batch_norm import batch_norm
from fused_ops.ops.cross_entropy_loss import cross_entropy
from fused_ops.ops.linear_cross_entropy import linear_cross_entropy
from fused_ops.ops.mlp import mlp, mlp_sgd_steps

__all__ = ["batch_norm", "cross_entropy", "linear_cross_entropy", "mlp", "mlp_sgd_steps"]
