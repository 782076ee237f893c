"""How a sample is made: from a dtype and a device, with the same values every time."""

import zlib
from typing import Any, Callable, Dict, NamedTuple

import torch


class Sample(NamedTuple):
    args: tuple  # of the public function; the tensors to differentiate by require grad
    kwargs: Dict[str, Any]


class Case(NamedTuple):
    """Builds one sample; `gradcheck` is False where there is no number to check (NaN) or too many are."""

    build: Callable[..., Sample]
    gradcheck: bool = True


class Op(NamedTuple):
    function: Callable  # ours
    torch_function: Callable  # the one it replaces
    cases: Dict[str, Case]


class Maker:
    """Makes the tensors of one case: by default of the dtype under test, requiring grad."""

    def __init__(self, name, dtype, device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def __call__(self, *shape, low=-3.0, high=3.0, dtype=None, requires_grad=True):
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return values.to(self.device, dtype or self.dtype).requires_grad_(requires_grad)

    def weights(self, *shape, **kwargs):
        return self(*shape, low=0.2, high=2.0, **kwargs)

    def indices(self, *shape, classes):
        return torch.randint(0, max(classes, 1), shape, generator=self.generator).to(self.device)

    def probabilities(self, *shape):
        t = self(*shape, requires_grad=False)
        return torch.softmax(t.double(), 0 if len(shape) == 1 else 1).to(self.dtype).requires_grad_()


def leaf(t):
    """A tensor with the strides of `t`, cut off from its history."""
    return t.detach().requires_grad_()
