"""The cases that every op is tested on. A new op adds an entry to `OPS`; the tests find it there.

A sample is built anew for each test, from a dtype and a device, with the same values every time. No weight is all
zeros or ones: those hide a wrong backward pass.
"""

import fused_ops.functional
from samples.batch_norm import batch_norm_cases, composed_batch_norm
from samples.losses import (
    cross_entropy_cases,
    linear_cross_entropy_cases,
    torch_cross_entropy,
    torch_linear_cross_entropy,
)
from samples.making import Op, Sample, leaf
from samples.mlp import mlp_cases, torch_mlp

__all__ = [
    "OPS",
    "Sample",
    "composed_batch_norm",
    "leaf",
    "torch_mlp",
]

OPS = {
    "cross_entropy": Op(fused_ops.functional.cross_entropy, torch_cross_entropy, cross_entropy_cases()),
    "linear_cross_entropy": Op(
        fused_ops.functional.linear_cross_entropy, torch_linear_cross_entropy, linear_cross_entropy_cases()
    ),
    "batch_norm": Op(fused_ops.functional.batch_norm, composed_batch_norm, batch_norm_cases()),
    "mlp": Op(fused_ops.functional.mlp, torch_mlp, mlp_cases()),
}
