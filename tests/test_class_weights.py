"""Derivatives by class weights: beside probabilities all of them, beside class indices an error, as PyTorch has it.

No op of ours is differentiable by them, so where they are differentiated the reference runs.
"""

import functools

import pytest
import torch
from checks import F64, assert_as_near
from samples.losses import torch_cross_entropy, torch_linear_cross_entropy

import fused_ops.functional as F

X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], dtype=F64)
W = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75], [2.5, 1.25, 0.75]], dtype=F64)
INDICES, PROBABILITIES = torch.tensor([2, 0]), X.cos().softmax(1)
WEIGHT = torch.tensor([2.5, 1.25, 0.75], dtype=F64)
OPTIONS = {"plain": {}, "everything": {"reduction": "sum", "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}}

OURS = {
    "cross_entropy": F.cross_entropy,
    "linear_cross_entropy": lambda x, y, **options: F.linear_cross_entropy(x, W.to(x), y, **options),
}
THEIRS = {
    "cross_entropy": torch_cross_entropy,
    "linear_cross_entropy": lambda x, y, **options: torch_linear_cross_entropy(x, W.to(x), y, **options),
}
TRANSFORMS = {
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "jacfwd of jacrev": lambda f: torch.func.jacfwd(torch.func.jacrev(f)),
    "jacrev of jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "vmap of grad": lambda f: (
        lambda w: torch.func.vmap(torch.func.grad(lambda w: f(w).sum()))(torch.stack((w, w.cos())))
    ),
}


def by_class_weights(loss, target, **options):
    """The loss, and its gradients by the logits and by probabilities, as functions of the class weights alone."""
    of_weight = lambda weight, x=X, y=target: loss(x, y, weight=weight, **options)  # noqa: E731
    by_logits = lambda weight: torch.func.grad(lambda x: of_weight(weight, x))(X)  # noqa: E731
    by_target = lambda weight: torch.func.grad(lambda y: of_weight(weight, y=y))(target)  # noqa: E731
    return of_weight, by_logits, *[by_target] * target.is_floating_point()


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
@pytest.mark.parametrize("name", OURS)
def test_beside_indices_they_are_refused_not_zero(name, transform):
    for f in by_class_weights(OURS[name], INDICES):
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
            transform(f)(WEIGHT)


def jacobian(f):  # by autograd, without a transform
    return functools.partial(torch.autograd.functional.jacobian, f)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev, jacobian])
@pytest.mark.parametrize("target", [INDICES, PROBABILITIES], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", OURS)
def test_of_an_exported_program_they_are_refused_not_zero(name, target, transform):
    """It has the op itself, since nobody differentiated by them when it was exported."""

    class Loss(torch.nn.Module):
        def forward(self, x, weight):
            return OURS[name](x, target, weight=weight)

    exported = torch.export.export(Loss(), (X, WEIGHT)).module()
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        transform(lambda weight: exported(X, weight))(WEIGHT)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", OURS)
def test_transforms_beside_probabilities(name, options, transform):
    """Of the loss and of its gradients, by a transform around one that knows nothing of the weights, too."""
    ours, theirs = (by_class_weights(losses[name], PROBABILITIES, **options) for losses in (OURS, THEIRS))
    for f, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(transform(f)(WEIGHT), transform(expected)(WEIGHT))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", OURS)
def test_gradcheck_beside_probabilities(name, options):
    inputs = [t.clone().requires_grad_() for t in (X, PROBABILITIES, WEIGHT)]
    loss = lambda x, y, weight: OURS[name](x, y, weight=weight, **options)  # noqa: E731
    torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True)


def loss_and_gradients(loss, dtype, autocast):
    inputs = [t.detach().to(dtype).requires_grad_() for t in (X, PROBABILITIES, WEIGHT)]
    with torch.autocast("cpu", enabled=autocast):
        out = loss(*inputs)
    return out, *torch.autograd.grad(out, inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_dtypes_beside_probabilities(name, dtype, autocast, compiled):
    torch.compiler.reset()
    ours, theirs = (lambda x, y, weight, f=f: f(x, y, weight=weight) for f in (OURS[name], THEIRS[name]))
    if compiled:
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    truth = loss_and_gradients(theirs, F64, False)
    assert_as_near(loss_and_gradients(ours, dtype, autocast), loss_and_gradients(theirs, dtype, autocast), truth)


@pytest.mark.parametrize("name", OURS)
def test_only_who_differentiates_by_them_pays(name):
    """Else the op runs, in whose place the reference's steps would each be kept."""
    nodes = []
    for differentiated in (False, True):
        weight = WEIGHT.clone().requires_grad_(differentiated)
        loss = OURS[name](X.clone().requires_grad_(), PROBABILITIES, weight=weight)
        nodes.append("CrossEntropy" in loss.grad_fn.name())
    assert nodes == [True, False]
