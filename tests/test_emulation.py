"""The CUDA kernels on an emulated card (tests/emulation), and the emulation itself: what mistakes it finds.

`make test-emulated` runs these, and those tests of each op that compare it with its reference.
"""

import contextlib

import pytest
import torch
from samples import OPS, Sample, leaf
from samples.making import Case, Maker
from test_mlp import assert_both_ops_match_references, examples, network
from test_ops import assert_matches_torch

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.emulation, "fault"), reason="needs make test-emulated")

CARD = {"threads": 2048, "shared_memory": 99 * 1024, "clusters": True}  # as in tests/emulation/machine.h


@contextlib.contextmanager
def card(**changes):
    """The emulated card has other threads a processor, bytes of shared memory a block, or no clusters."""
    torch.ops.emulation.set_card(**{**CARD, **changes})
    try:
        yield
    finally:
        torch.ops.emulation.set_card(**CARD)


RACE, NOT_WRITTEN = "race in shared memory", "shared memory that nobody has written"
FAULTS = {
    "no_barrier": f"{RACE}|{NOT_WRITTEN}",  # by the order in which threads run
    "no_second_barrier": RACE,
    "exchange_for_barrier": RACE,
    "block_barrier_for_grid": "race in global memory.* of block",
    "not_written": NOT_WRITTEN,
    "different_barriers": r"wait at different barriers: faults.cu:\d+, faults.cu:\d+",
    "early_end": r"a thread ended where others wait for it: faults.cu:\d+",
    "part_of_warp": r"a thread ended where others wait for it: faults.cu:\d+",
    "barrier_in_part_of_warp": r"wait for each other in vain: faults.cu:\d+ faults.cu:\d+",
    "out_of_bounds": "access to memory that is of no tensor",
    "write_to_fixed": "a tensor is written that the op has asked for only to read",
    "misaligned": r"no multiple of its type's alignment: packs.cuh:\d+",
    "misaligned_copy": "addresses that are no multiple of its size",
    "beyond_array": r"an index beyond its array: faults.cu:\d+",
    "overflow": r"a product beyond its type: faults.cu:\d+",
    "beyond_dynamic_memory": "beyond the block's dynamic shared memory, at byte 512 of 512",
    "copy_before_it_is_there": NOT_WRITTEN,
    "copy_without_waiting": "copies under way that it did not wait for",
    "copy_without_barrier": f"{RACE}|{NOT_WRITTEN}",
    "end_before_neighbour_has_read": "shared memory of a block that ends",
    "no_such_neighbour": "no such block in the cluster",
    "assertion": r"device-side assert: data.fixed\[thread_of_grid\(\)\] < 0",
}


def provoke(name, blocks=4, together=True, cluster=1):
    x, fixed = torch.zeros(64 * blocks), torch.arange(64.0 * blocks)
    torch.ops.emulation.fault(name, x, fixed, together, cluster)
    return x, fixed


@pytest.mark.parametrize("name", FAULTS)
def test_mistakes_are_found(name):
    launched = {"together": False, "cluster": 2} if "neighbour" in name else {}
    for _ in range(3):  # in each order of threads
        with pytest.raises(RuntimeError, match=FAULTS[name]):
            provoke(name, **launched)


def test_a_kernel_without_mistakes():
    for _ in range(3):
        x, fixed = provoke("none")
        # reversed in each block, then in all; then the sum of each warp
        expected = fixed.view(4, 64).flip(1).flatten().flip(0).view(-1, 32).sum(1).repeat_interleave(32)
        torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_blocks_that_wait_for_each_other_are_there_together():
    with pytest.raises(RuntimeError, match="that need not be there together: faults.cu"):
        provoke("none", together=False)
    with pytest.raises(RuntimeError, match="does not launch"):
        provoke("none", blocks=1000)


# ---------------------------------------------------------------------------------------------------------- the kernels

LOSSES = {
    "indices": {},
    "indices-everything": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 9.0},
    "probabilities": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "blocks"])
@pytest.mark.parametrize("shared_memory", [CARD["shared_memory"], 24 * 1024], ids=["kept", "read-again"])
@pytest.mark.parametrize("C", [5000, 40007])
def test_cross_entropy_of_long_rows(C, shared_memory, clusters, kind, dtype):
    """Rows of a block or of a cluster, kept in shared memory or not, that don't begin at bounds of 16 bytes."""

    def build(*_):
        make = Maker("long-rows", dtype, "cpu")
        target = make.probabilities(3, C) if kind == "probabilities" else make.indices(3, classes=C)
        return Sample((make(3, C), target), LOSSES[kind])

    with card(shared_memory=shared_memory, clusters=clusters):
        assert_matches_torch(OPS["cross_entropy"], Case(build), dtype, "cpu")


@pytest.mark.parametrize(
    ("dtype", "activation"),  # in 16 bits dz is not rounded with ReLU alone
    [(torch.float32, "silu"), (torch.bfloat16, "silu"), (torch.bfloat16, "relu")],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape", [(180, 2, 16, 24), (40, 3, 15, 17), (75, 520, 2, 2)], ids=["packs", "single", "many-channels"]
)
@pytest.mark.parametrize("shared_memory", [CARD["shared_memory"], 8 * 1024], ids=["on-chip", "off-chip"])
# of a small card each cluster takes channels of its own; of a large one all blocks share them
@pytest.mark.parametrize("blocks", [{"threads": 256}, {"clusters": False}], ids=["clusters", "all-blocks"])
def test_batch_norm_of_channels_that_blocks_share(blocks, shared_memory, shape, memory_format, dtype, activation):
    """In one launch, and in two; what is read again is kept, or is not."""

    def build(*_):
        make = Maker("shared-channels", dtype, "cpu")
        x, residual = (leaf(make(*shape).to(memory_format=memory_format)) for _ in range(2))
        C = shape[1]
        running = {"running_mean": make(C, requires_grad=False), "running_var": make.weights(C, requires_grad=False)}
        affine = {"weight": make.weights(C), "bias": make(C)}
        return Sample((x,), {**running, **affine, "training": True, "activation": activation, "residual": residual})

    with card(shared_memory=shared_memory, **blocks):
        assert_matches_torch(OPS["batch_norm"], Case(build), dtype, "cpu")


@pytest.mark.parametrize("shared_memory", [CARD["shared_memory"], 4 * 1024], ids=["fits", "does-not-fit"])
def test_networks_of_every_size(shared_memory):
    with card(shared_memory=shared_memory):
        assert_both_ops_match_references(network(), *examples(20))


def test_a_target_out_of_bounds_is_an_assertion():
    op = torch.ops.fused_ops.cross_entropy_forward  # the public function on the CPU looks itself
    for target in (5, -1):
        with pytest.raises(RuntimeError, match="device-side assert: in_bounds"):
            op(torch.zeros(2, 5), torch.tensor([0, target]), None, -100, "mean", 0.0, 0.0, None)
