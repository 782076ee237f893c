"""A network of our layers, compiled, in CUDA graphs and exported: it trains like one of torch.nn's."""

import pytest
import torch
from checks import NEEDS_CUDA
from torch.testing import assert_close

import fused_ops.nn

N, H, C = 6, 4, 5
GENERATOR = torch.Generator().manual_seed(0)
INPUT = torch.randn(N, H, generator=GENERATOR)
CLASSES = torch.randint(C, (N,), generator=GENERATOR)


class Network(torch.nn.Module):
    """The MLP of the README, with the layers of fused_ops.nn or of torch.nn."""

    def __init__(self, nn):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(H, 8), nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, C)
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, input, target):
        return self.loss(self.body(input), target)


def assert_trains_like_torch(ours, module):
    """A callable of our `module`: loss, gradients and buffers after a step are those of torch.nn's layers."""
    theirs = Network(torch.nn)
    theirs.load_state_dict(module.state_dict())
    module.zero_grad()
    losses = ours(INPUT, CLASSES), theirs(INPUT, CLASSES)
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(module.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert_close(dict(module.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_a_network_of_our_layers_compiles(dynamic):
    torch.compiler.reset()
    module = Network(fused_ops.nn)
    assert_trains_like_torch(torch.compile(module, fullgraph=True, dynamic=dynamic), module)


@NEEDS_CUDA
def test_a_network_of_our_layers_runs_in_cuda_graphs():
    torch.compiler.reset()
    module, theirs = (Network(nn).cuda() for nn in (fused_ops.nn, torch.nn))
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    input, target = INPUT.cuda(), CLASSES.cuda()
    for _ in range(4):  # PyTorch records the graph on the way, then replays it
        losses = compiled(input, target), theirs(input, target)
        assert_close(*losses)
        for loss, owner in zip(losses, (module, theirs), strict=True):
            owner.zero_grad()
            loss.backward()
        for a, b in zip(module.parameters(), theirs.parameters(), strict=True):
            assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_still_trains(strict):
    """The exported graph has our ops, and they are differentiable there."""
    module = Network(fused_ops.nn)
    program = torch.export.export(module, (INPUT, CLASSES), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"fused_ops.cross_entropy_forward.default", "fused_ops.batch_norm_forward.default"} <= targets
    exported = program.module()
    assert_trains_like_torch(exported, exported)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_linear_cross_entropy(strict):
    module = fused_ops.nn.LinearCrossEntropyLoss(H, C, bias=True)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        module, (INPUT, CLASSES), dynamic_shapes=({0: batch}, {0: batch}), strict=strict
    ).module()
    losses = exported(INPUT[:3], CLASSES[:3]), module(INPUT[:3], CLASSES[:3])
    assert_close(*losses)
    gradients = []
    for loss, owner in zip(losses, (exported, module), strict=True):
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in owner.named_parameters()})
    assert_close(*gradients)
