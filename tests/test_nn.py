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


@pytest.mark.parametrize("module", [fused_ops.nn.BatchNorm2d(3), fused_ops.nn.CrossEntropyLoss(torch.rand(3) + 0.5)])
def test_modules_can_be_copied_and_saved(module):
    scramble(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    others = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)
    for other in others:
        assert type(other) is type(module)
        assert_close(dict(other.state_dict()), dict(module.state_dict()))


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
