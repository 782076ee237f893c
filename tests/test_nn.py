"""Modules as drop-ins: state_dict both ways, the same training, the same buffers, as their torch.nn namesakes."""

import copy
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

import fused_ops.nn

BATCH_NORMS = [("BatchNorm1d", (6, 4)), ("BatchNorm1d", (6, 4, 3)), ("BatchNorm2d", (3, 4, 5, 2))]
BATCH_NORMS += [("BatchNorm3d", (3, 4, 2, 3, 2))]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.01},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64},
]


def scramble(module):
    """Fill parameters and floating buffers with values that are neither all zeros nor all ones."""
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point():
            t.data.uniform_(0.3, 1.7)
    return module


@pytest.mark.parametrize(("name", "shape"), BATCH_NORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loads", ["ours", "theirs"])
def test_batch_norm_is_a_drop_in(name, shape, options, loads):
    torch.manual_seed(0)
    ours, theirs = (getattr(namespace, name)(4, **options) for namespace in (fused_ops.nn, torch.nn))
    source, target = (theirs, ours) if loads == "ours" else (ours, theirs)
    target.load_state_dict(scramble(source).state_dict(), strict=True)
    assert isinstance(ours, getattr(torch.nn, name))

    dtype = options.get("dtype", torch.float32)
    for training in (True, True, False, True):  # the buffers move, then are used, then move on
        x = torch.randn(shape, dtype=dtype)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        outs = [module.train(training)(x) for module, x in zip((ours, theirs), xs, strict=True)]
        assert_close(*outs)
        dout = torch.randn(shape, dtype=dtype)
        for module, out in zip((ours, theirs), outs, strict=True):
            module.zero_grad()
            out.backward(dout)
        assert_close(xs[0].grad, xs[1].grad)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(p.grad, q.grad)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize(("name", "shape"), [("BatchNorm1d", (2, 4, 3, 3)), ("BatchNorm2d", (2, 4))])
def test_batch_norm_checks_its_input(name, shape):
    with pytest.raises(ValueError, match="expected"):
        getattr(fused_ops.nn, name)(4)(torch.randn(shape))


def test_batch_norm_with_an_activation():
    """The activation is an option of the module: it shows in its repr, and neither it nor the residual is state."""
    plain, ours = fused_ops.nn.BatchNorm1d(4), fused_ops.nn.BatchNorm1d(4, activation="tanh")
    assert repr(plain) == repr(torch.nn.BatchNorm1d(4))
    assert repr(ours) == repr(plain)[:-1] + ", activation='tanh')"
    theirs = torch.nn.BatchNorm1d(4)
    theirs.load_state_dict(scramble(ours).state_dict(), strict=True)
    x, residual = torch.randn(6, 4), torch.randn(6, 4)
    assert_close(ours(x, residual), torch.tanh(theirs(x) + residual))
    assert_close(ours(x), torch.tanh(theirs(x)))
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    with pytest.raises(ValueError, match="activation must be None or one of"):
        fused_ops.nn.BatchNorm2d(4, activation="softplus")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_training_batch_norm_compiles_without_graph_breaks(dynamic, momentum):
    """With running statistics, which a compiled module moves as it should."""
    torch.compiler.reset()
    torch.manual_seed(0)
    ours = scramble(fused_ops.nn.BatchNorm1d(4, momentum=momentum, activation="gelu"))
    theirs = torch.nn.BatchNorm1d(4, momentum=momentum)
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (5, 6 if dynamic else 5, 7 if dynamic else 5):
        x, residual = torch.randn(N, 4, requires_grad=True), torch.randn(N, 4, requires_grad=True)
        outs = compiled(x, residual), torch.nn.functional.gelu(theirs(x) + residual)
        assert_close(*outs)
        grads = (
            torch.autograd.grad(out.sin().sum(), (x, residual, *module.parameters()))
            for out, module in zip(outs, (ours, theirs), strict=True)
        )
        assert_close(*grads)
        assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_can_be_exported(training):
    ours = scramble(fused_ops.nn.BatchNorm1d(4, activation="silu")).train(training)
    theirs = torch.nn.BatchNorm1d(4).train(training)
    theirs.load_state_dict(ours.state_dict())
    batch = {0: torch.export.Dim("N", min=2)}
    x, residual = torch.randn(5, 4), torch.randn(5, 4)
    exported = torch.export.export(ours, (x, residual), dynamic_shapes={"input": batch, "residual": batch}).module()
    for N in (5, 9):
        x, residual = torch.randn(N, 4), torch.randn(N, 4)
        assert_close(exported(x, residual), torch.nn.functional.silu(theirs(x) + residual))
        assert_close(dict(exported.state_dict()), dict(theirs.state_dict()))


def test_batch_norm_under_autocast_runs_in_the_dtype_of_its_input():
    ours, theirs, linear = (
        fused_ops.nn.BatchNorm1d(4, activation="relu"),
        torch.nn.BatchNorm1d(4),
        torch.nn.Linear(4, 4),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = linear(torch.randn(6, 4))
        y, expected = ours(h), torch.relu(theirs(h))
    assert y.dtype == h.dtype == torch.bfloat16
    assert_close(y, expected)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    y.sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_batch_norm_without_values_or_without_autograd():
    """On meta tensors, with the strides that real ones would have; in inference mode; with deterministic algorithms."""
    module = fused_ops.nn.BatchNorm2d(3, device="meta", activation="tanh")
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.stride() == x.grad.stride() == x.stride()
    assert module.weight.grad.shape == (3,)
    module = fused_ops.nn.BatchNorm1d(4, activation="tanh")
    with torch.inference_mode():
        assert module(torch.randn(6, 4), torch.randn(6, 4)).is_inference()
    try:
        torch.use_deterministic_algorithms(True)
        module(torch.randn(6, 4)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("loads", ["ours", "theirs"])
def test_cross_entropy_loss_is_a_drop_in(loads):
    weight = torch.tensor([0.5, 1.5, 2.0, 0.25])
    options = {"ignore_index": 1, "reduction": "sum", "label_smoothing": 0.2}
    ours = fused_ops.nn.CrossEntropyLoss(weight, **options)
    theirs = torch.nn.CrossEntropyLoss(weight.flip(0), **options)
    source, target = (theirs, ours) if loads == "ours" else (ours, theirs)
    target.load_state_dict(source.state_dict(), strict=True)

    torch.manual_seed(0)
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    xs = [logits.clone().requires_grad_() for _ in range(2)]
    losses = [module(x, y) for module, x in zip((ours, theirs), xs, strict=True)]
    assert_close(*losses)
    assert_close(*(torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, xs, strict=True)))


@pytest.mark.parametrize(
    "module", [fused_ops.nn.BatchNorm2d(3, activation="gelu"), fused_ops.nn.CrossEntropyLoss(torch.rand(3) + 0.5)]
)
def test_modules_can_be_copied_and_saved(module):
    scramble(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    others = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)
    for other in others:
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert_close(dict(other.state_dict()), dict(module.state_dict()))


def test_skip_init():
    layer = torch.nn.utils.skip_init(fused_ops.nn.BatchNorm2d, 3, affine=False, activation="gelu", device="meta")
    assert (layer.num_features, layer.affine, layer.activation) == (3, False, "gelu")


def test_a_model_of_our_layers_trains_like_one_of_torchs():
    def losses(layers):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), layers.BatchNorm1d(16), torch.nn.Tanh())
        model.append(torch.nn.Linear(16, 5))
        criterion, optimizer = layers.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
        X, Y = torch.randn(64, 8), torch.randint(0, 5, (64,))
        for _ in range(50):
            optimizer.zero_grad()
            loss = criterion(model(X), Y)
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours, theirs = list(losses(fused_ops.nn)), list(losses(torch.nn))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours[-1] < 0.8 * ours[0]


class Block(torch.nn.Module):
    """A residual block and its loss: its layers are attributes, in a list, and used twice."""

    def __init__(self, layers):
        super().__init__()
        self.convolution, self.norm = torch.nn.Conv2d(3, 4, 1), layers.BatchNorm2d(4, eps=1e-3, momentum=None)
        self.more = torch.nn.ModuleList([torch.nn.Linear(4, 4), layers.BatchNorm1d(4, affine=False)])
        self.loss = layers.CrossEntropyLoss(torch.tensor([0.5, 1.5, 2.0, 0.25]), label_smoothing=0.1)

    def forward(self, x, target):
        h = self.convolution(x)
        h = (h + torch.relu(self.norm(self.norm(h)))).mean((2, 3))
        for layer in self.more:
            h = layer(h)
        return self.loss(h, target)


def test_convert_makes_a_model_ours_while_it_trains():
    """Half-way: the optimiser, the state, hooks and options stay, and so does what the model computes."""
    torch.manual_seed(0)
    theirs = Block(torch.nn)
    ours = copy.deepcopy(theirs)
    seen = []
    hook = ours.norm.register_forward_hook(lambda norm, input, output: seen.append(type(norm)))
    x, target = torch.randn(6, 3, 5, 2), torch.randint(4, (6,))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(6):
            if step == 3 and model is ours:
                parameters, keys = list(model.parameters()), model.state_dict().keys()
                assert fused_ops.convert(model) is model
                assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
                assert model.state_dict().keys() == keys
            optimizer.zero_grad()
            losses.append(model(x, target))
            losses[-1].backward()
            optimizer.step()
    assert_close(losses[:6], losses[6:])
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert [type(layer) for layer in (ours.norm, ours.more[1], ours.loss)] == [
        fused_ops.nn.BatchNorm2d,
        fused_ops.nn.BatchNorm1d,
        fused_ops.nn.CrossEntropyLoss,
    ]
    assert seen == 6 * [torch.nn.BatchNorm2d] + 6 * [fused_ops.nn.BatchNorm2d]
    assert repr(ours) == repr(theirs)
    hook.remove()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, target), theirs(x, target))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has none before 2.13")
def test_convert_makes_linear_cross_entropy_ours():
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    arguments = {"bias": True, "ignore_index": 1, "options": options}
    theirs = torch.nn.LinearCrossEntropyLoss(4, 5, **arguments)
    ours = fused_ops.convert(copy.deepcopy(theirs))
    assert type(ours) is fused_ops.nn.LinearCrossEntropyLoss
    x, target = torch.randn(6, 4), torch.randint(5, (6,))
    for loss in (ours, theirs):
        loss(x, target).backward()
    assert_close(ours(x, target), theirs(x, target))
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert repr(ours) == repr(fused_ops.nn.LinearCrossEntropyLoss(4, 5, **arguments))


def test_convert_leaves_what_it_does_not_know():
    class Subclass(torch.nn.BatchNorm1d):
        pass

    alone = torch.nn.BatchNorm3d(2)
    assert type(fused_ops.convert(alone)) is fused_ops.nn.BatchNorm3d
    layers = [Subclass(4), torch.nn.SyncBatchNorm(4), torch.nn.LazyBatchNorm1d(), torch.nn.NLLLoss()]
    parametrized = torch.nn.BatchNorm1d(4)  # whose class is made for it
    torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", torch.nn.Identity())
    layers += [fused_ops.nn.BatchNorm1d(4, activation="relu"), parametrized]
    types = [type(layer) for layer in layers]
    model = fused_ops.convert(torch.nn.Sequential(*layers))
    assert [type(layer) for layer in model] == types
    assert model[4].activation == "relu"
