"""A gradient written by hand beside autograd's: the lecture's `cmp()`, returning what it found."""

from typing import NamedTuple

import torch


class Comparison(NamedTuple):
    """How far a manual gradient is from its reference; prints as one row of the lecture's table."""

    name: str
    exact: bool  # equal bit for bit
    approximate: bool  # equal within `torch.allclose`'s tolerances
    maxdiff: float  # largest absolute difference, in the units of the gradient

    def __str__(self):
        exact, approximate = str(self.exact), str(self.approximate)
        return f"{self.name:15s} | exact: {exact:5s} | approximate: {approximate:5s} | maxdiff: {self.maxdiff}"


def compare(name, manual, reference):
    """Compare two tensors of one shape, as the lecture's `cmp(s, dt, t)` does for `dt` and `t.grad`.

    Args:
        name: what to call the gradient in the printed row.
        manual: the gradient written by hand.
        reference: the gradient to trust, or a tensor whose `.grad` that is.

    Returns:
        A `Comparison`. NaNs count as different, so a gradient with a NaN in it is never exact.

    Raises:
        ValueError: the shapes differ (they must not broadcast), or the reference has no gradient.

    Source: the lecture "Becoming a backprop ninja" (makemore, part 4).
    """
    if reference.requires_grad:
        if reference.grad is None:
            raise ValueError(f"{name}: the reference has no .grad; call backward (and retain_grad) first")
        reference = reference.grad
    if manual.shape != reference.shape:
        raise ValueError(f"{name}: shapes differ, {tuple(manual.shape)} by hand and {tuple(reference.shape)}")
    maxdiff = (manual - reference).abs().max().item() if manual.numel() else 0.0
    exact = bool((manual == reference).all())
    return Comparison(name, exact, torch.allclose(manual, reference), maxdiff)
