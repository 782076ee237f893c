"""Derivatives of every order, by every way that PyTorch has of asking for them."""

import pytest
import torch
from samples import composed_batch_norm

import fused_ops.functional as F

LOGITS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
TARGET = torch.tensor([2, 0])
X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75], [2.5, 1.25, 0.75]])
STATISTICS = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 1.1, 1.2])
BATCH_STATISTICS = {"running_mean": None, "running_var": None, "training": True}


def losses(F):
    return {
        "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([2, 0, 1]), label_smoothing=0.1),
        "cross_entropy probabilities": lambda x: F.cross_entropy(x, X.softmax(1).to(x)),
        "linear_cross_entropy": lambda x: F.linear_cross_entropy(x, X.cos().to(x), torch.tensor([2, 0, 1])),
        "batch_norm": lambda x: F.batch_norm(x, None, None, training=True).sin().sum(),
        "batch_norm residual": lambda x: F.batch_norm(x, **BATCH_STATISTICS, residual=x.sin()).sin().sum(),
        "batch_norm gelu": lambda x: (
            F.batch_norm(x, None, None, x[0], x[1], True, activation="gelu", residual=x.sin()).sin().sum()
        ),
        "both": lambda x: F.cross_entropy(F.batch_norm(x, None, None, training=True), torch.tensor([2, 0, 1])),
    }


class WrittenOut:
    """What to expect. torch's own batch norm has wrong third derivatives, and wrong second ones in forward mode."""

    cross_entropy = staticmethod(torch.nn.functional.cross_entropy)

    @staticmethod
    def linear_cross_entropy(x, linear_weight, target):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, linear_weight), target)

    @staticmethod
    def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=True, activation=None, residual=None):
        centred = x - x.mean(0)
        z = centred * (centred.square().mean(0) + 1e-5) ** -0.5
        z = z if weight is None else weight * z + bias
        z = z if residual is None else z + residual
        return z if activation is None else getattr(torch.nn.functional, activation)(z)


LOSSES, EXPECTED = losses(F), losses(WrittenOut)
TRANSFORMS = {
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,  # forward mode over reverse mode
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jacrev of jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, where an op is vmapped in a loop
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_transforms(name, transform):
    torch.testing.assert_close(transform(LOSSES[name])(X.double()), transform(EXPECTED[name])(X.double()))


@pytest.mark.parametrize("transform", ["grad", "hessian", "jvp"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_transforms(name, transform):
    torch.compiler.reset()
    compiled = torch.compile(TRANSFORMS[transform](LOSSES[name]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X.double()), TRANSFORMS[transform](EXPECTED[name])(X.double()))


def third_derivatives(f):
    gradient_norm = lambda g: lambda x: torch.func.grad(g)(x).square().sum()  # noqa: E731
    return torch.func.grad(gradient_norm(gradient_norm(f)))


def test_third_derivatives():
    torch.testing.assert_close(
        third_derivatives(LOSSES["both"])(X.double()), third_derivatives(EXPECTED["both"])(X.double())
    )


def test_hessian_vector_product():
    for vhp in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        ours, theirs = (vhp(f, X.double(), X.double().cos())[1] for f in (LOSSES["both"], EXPECTED["both"]))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients():
    def per_sample(F):
        return torch.func.vmap(torch.func.grad(lambda x, y: F.cross_entropy(x[None], y[None])))(LOGITS, TARGET)

    torch.testing.assert_close(per_sample(F), per_sample(torch.nn.functional))


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_under_vmap(training, activation):
    """Gradients, and gradients of gradients, of each batch in a batch of batches; with one weight and one residual for
    all, and a bias for each."""
    batches = torch.stack([X, X.sin(), X.cos() * 2]).double()
    biases = batches[:, 0].clone()
    args = batches, X[1].double(), biases, X.double().sin()
    statistics = (None, None) if training else tuple(t.double() for t in STATISTICS)

    def derivatives(batch_norm):
        def loss(x, weight, bias, residual):
            y = batch_norm(x, *statistics, weight, bias, training, activation=activation, residual=residual)
            return y.sin().sum()

        def gradient_norm(*args):
            return sum(g.square().sum() for g in torch.func.grad(loss, argnums=(0, 1, 2, 3))(*args))

        in_dims = (0, None, 0, None)
        first = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims)
        second = torch.func.vmap(torch.func.grad(gradient_norm, argnums=(0, 1, 2, 3)), in_dims)
        return first(*args), second(*args)

    torch.testing.assert_close(derivatives(F.batch_norm), derivatives(composed_batch_norm))


def test_batch_norm_under_vmap_moves_no_statistics():
    with pytest.raises(RuntimeError, match="vmap cannot move running statistics"):
        torch.func.vmap(lambda x: F.batch_norm(x, *(t.clone() for t in STATISTICS), training=True))(X.expand(2, 3, 3))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_forward_mode_within_forward_mode_is_refused_not_wrong(loss):
    def derivative(f, direction):
        return lambda x: torch.func.jvp(f, (x,), (direction,))[1]

    with pytest.raises(RuntimeError, match="forward mode within forward mode"):
        derivative(derivative(loss, X.cos()), X.sin())(X)


def second_derivatives(cross_entropy):
    """Of a batch that is ignored as a whole, whose mean loss is 0/0: by forward over reverse mode, and by reverse."""
    x = LOGITS.clone().requires_grad_()
    loss = lambda x: cross_entropy(x, torch.full((2,), -100), label_smoothing=0.25)  # noqa: E731
    (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.func.jvp(torch.func.grad(loss), (LOGITS,), (LOGITS.cos(),))[1], *torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_of_a_batch_that_is_ignored_are_zero(linear):
    ours = (lambda x, *args, **options: F.linear_cross_entropy(x, X, *args, **options)) if linear else F.cross_entropy
    assert_close = torch.testing.assert_close
    assert_close(second_derivatives(ours), (torch.zeros(2, 3),) * 2)
    if not linear:
        assert_close(second_derivatives(ours), second_derivatives(torch.nn.functional.cross_entropy))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_vmap_of_logits_with_positions(probabilities, reduction):
    x = torch.linspace(-2, 2, 5 * 2 * 3 * 4).sin().view(5, 2, 3, 4)
    y = x.cos().softmax(2) if probabilities else (x[:, :, 0] > 0).long()

    def derivatives(F):
        loss = lambda x, y: F.cross_entropy(x, y, reduction=reduction).sum()  # noqa: E731
        return torch.func.vmap(loss)(x, y), torch.func.vmap(torch.func.grad(loss))(x, y)

    torch.testing.assert_close(derivatives(F), derivatives(torch.nn.functional))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_compiles_without_graph_breaks(loss, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x = X.clone().requires_grad_()
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_second_backward_pass_gives_the_same_gradient(loss):
    x = X.clone().requires_grad_()
    out = loss(x)
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
