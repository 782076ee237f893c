"""The kernels in CUDA graphs: nothing is read back to the host, so a pass can be recorded, and replays bit for bit."""

import pytest
import torch
from checks import NEEDS_CUDA
from torch.testing import assert_close

from fused_ops._op import REFERENCES


def assert_replays(passes, expected):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = passes()
    for _ in range(2):
        graph.replay()
        assert_close(recorded, expected, rtol=0, atol=0)


@NEEDS_CUDA
@pytest.mark.parametrize("N", [64, 4096], ids=["on-chip", "off-chip"])  # 2 MiB, 128 MiB
def test_batch_norm_in_a_cuda_graph(N):
    """Blocks that share channels wait for each other."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(N, 8, 32, 32, device="cuda", generator=generator) for _ in range(2))
    weight, bias = (torch.rand(8, device="cuda", generator=generator) for _ in range(2))

    def passes(forward, backward):
        running_mean, running_var = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
        y, stats = forward(x, running_mean, running_var, weight, bias, True, 0.1, 1e-5, "silu", None)
        gradients = backward(dy, x, weight, bias, None, stats, True, 1e-5, "silu", True, True, False)
        return y, stats, running_mean, running_var, *gradients

    ops = torch.ops.fused_ops.batch_norm_forward.default, torch.ops.fused_ops.batch_norm_backward.default
    expected = passes(*ops)
    assert_close(expected, passes(*(REFERENCES[op] for op in ops)), rtol=1e-3, atol=1e-4)
    assert_replays(lambda: passes(*ops), expected)


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("C", [27, 4096, 50257, 262144], ids=["lanes", "block", "cluster", "8-blocks"])
def test_cross_entropy_in_a_cuda_graph(C, dtype):
    """Blocks that share a row wait for each other."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(5, C, device="cuda", dtype=dtype, generator=generator) * 5
    target = torch.randint(C, (5,), device="cuda", generator=generator)
    target[1] = -100
    weight = torch.rand(C, device="cuda", dtype=dtype, generator=generator) + 0.5
    options = -100, "mean", 0.0, 1e-3, 30.0

    def passes(forward, with_gradient, backward, backward_):
        loss, stats, divisor = forward(logits, target, weight, *options)
        narrowed, made = with_gradient(logits, target, weight, *options, True)
        saved, over = (target, weight, stats, divisor, *options), logits.clone()
        dlogits, _ = backward(loss, logits, *saved, True, False)
        backward_(loss, over, *saved, False)
        return loss, narrowed, stats, divisor, made, dlogits, over

    names = "forward", "with_gradient", "backward", "backward_"
    ops = [getattr(torch.ops.fused_ops, f"cross_entropy_{name}").default for name in names]
    expected = passes(*ops)
    assert_close(expected, passes(*(REFERENCES[op] for op in ops)), rtol=2e-2, atol=0)
    assert_replays(lambda: passes(*ops), expected)
