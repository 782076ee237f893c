"""Our functions where others record or batch them: torch.fx, make_fx, compiled autograd, exported programs."""

import pytest
import torch
import torch._dynamo.compiled_autograd
from test_transforms import EXPECTED, LOSSES, X
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import fused_ops.functional as F
import fused_ops.nn

every_loss = pytest.mark.parametrize("name", LOSSES)


def gradient(loss, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


@every_loss
def test_make_fx_traces_a_loss_with_its_gradient(name):
    traced = make_fx(lambda x: gradient(LOSSES[name], x))(X.clone())  # not X itself, which the losses have, too
    assert_close(traced(X.sin()), gradient(EXPECTED[name], X.sin()))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # it looks at all that is saved
@pytest.mark.parametrize("upstream", [1.0, 2.5])
@every_loss
def test_compiled_autograd_has_no_graph_breaks(name, upstream):
    torch.compiler.reset()
    x = X.clone().requires_grad_()
    loss = LOSSES[name](x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward(torch.tensor(upstream))
    assert_close(x.grad, upstream * gradient(EXPECTED[name], X))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_loss
def test_batched_gradients(name):
    """PyTorch has an older vmap for these, which `torch.func` does not know of."""
    x, upstream = X.clone().requires_grad_(), torch.tensor([0.0, 1.0, -2.0])
    (grads,) = torch.autograd.grad(LOSSES[name](x), x, upstream, is_grads_batched=True)
    assert_close(grads, upstream[:, None, None] * gradient(EXPECTED[name], X))
    assert_close(*(torch.autograd.functional.jacobian(LOSSES[name], X, vectorize=v) for v in (True, False)))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm, self.loss = fused_ops.nn.BatchNorm1d(3, activation="tanh"), fused_ops.nn.CrossEntropyLoss()
        for t in (*self.norm.parameters(), *self.norm.buffers()):
            if t.is_floating_point():
                t.detach().uniform_(0.5, 1.5, generator=generator)

    def forward(self, x):
        return self.loss(self.norm(x), torch.tensor([2, 0, 1])).square()


def expected(x):
    """What `Model` computes, in evaluation."""
    norm = Model().norm
    mean, var, weight, bias = norm.running_mean, norm.running_var, norm.weight.detach(), norm.bias.detach()
    y = torch.tanh(torch.nn.functional.batch_norm(x, mean, var, weight, bias))
    return torch.nn.functional.cross_entropy(y, torch.tensor([2, 0, 1])).square()


EXPORTED = torch.export.export(Model().eval(), (X,)).module()


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: lambda x: torch.func.vjp(f, x)[1](torch.tensor(2.0))[0],
    ],
    ids=["grad", "jacrev", "jvp", "vjp"],
)
def test_an_exported_program_under_one_transform(transform):
    assert_close(transform(EXPORTED)(X).detach(), transform(expected)(X))


@pytest.mark.parametrize(
    "transform",
    [torch.func.hessian, lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())],
    ids=["hessian", "grad of grad"],
)
def test_an_exported_program_under_two_is_refused_not_wrong(transform):
    with pytest.raises(RuntimeError, match="one transform of torch.func at a time"):
        transform(EXPORTED)(X)


class Network(torch.nn.Module):
    """The names network's loss in one op."""

    def __init__(self):
        super().__init__()
        self.net = fused_ops.nn.MLP(5, 2, 1, 3).eval()

    def forward(self, x):
        return self.net(torch.tensor([[1], [2]]), torch.tensor([2, 4]))


PROGRAMS = {"norm": EXPORTED, "net.norm": torch.export.export(Network(), (X,)).module()}


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
@pytest.mark.parametrize("norm", PROGRAMS)
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev], ids=lambda f: f.__name__)
def test_an_exported_program_by_running_statistics_is_refused_not_zero(transform, norm, statistic):
    def by_statistics(v):
        return torch.func.functional_call(PROGRAMS[norm], {f"{norm}.{statistic}": v}, X)

    with pytest.raises(RuntimeError, match="not differentiable with respect to running_mean or running_var"):
        transform(by_statistics)(X[0].square())


@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_our_layers(training):
    model = Model().train(training)
    traced = torch.fx.symbolic_trace(model)
    assert F.batch_norm in {node.target for node in traced.graph.nodes}
    assert_close(gradient(traced, X), gradient(Model().train(training), X))


def test_fx_refuses_what_it_would_lose():
    """How many batches there were, which decides how far each moves the running statistics."""
    with pytest.raises(NotImplementedError, match="momentum=None"):
        torch.fx.symbolic_trace(fused_ops.nn.BatchNorm1d(3, momentum=None))
