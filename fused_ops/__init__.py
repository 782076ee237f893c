"""Training operations for PyTorch with gradients derived by hand, fused, and proved right by gradcheck.

`fused_ops.functional` and `fused_ops.nn` mirror their `torch.nn` namesakes; `fused_ops.steps` is the same mathematics
one elementary step at a time; `fused_ops.compare` sets a gradient beside autograd's; `fused_ops.convert` makes a model
of torch.nn's layers one of ours.
"""

from fused_ops import _flops, functional, nn  # noqa: F401
from fused_ops._op import has_kernels, load_kernels, reference_mode
from fused_ops.compare import compare
from fused_ops.nn import convert

__version__ = "0.1.0"
__all__ = ["compare", "convert", "functional", "has_kernels", "nn", "reference_mode"]

load_kernels()
