"""On the lecture's own names: its data sets, its parameters, its first minibatch, its table."""

import os

import pytest
import torch

from fused_ops import data, ladder
from fused_ops.compare.__main__ import SEED, comparisons

FIRST_TARGETS = [8, 14, 15, 22, 0, 19, 9, 14, 5, 1, 20, 3, 8, 14, 12, 0, 11, 0, 26, 9, 25, 0, 1, 1, 7, 18, 9, 3, 5, 9]
FIRST_TARGETS += [0, 18]


@pytest.fixture(scope="module")
def names():
    return data.read_names(os.environ["FUSED_OPS_SEED_NAMES"])


def test_data_sets_parameters_and_first_minibatch(names):
    characters = data.vocabulary(names)
    assert len(names) == 32033
    assert len(characters) == 27
    splits = [data.contexts(part, characters, block_size=3) for part in data.split_names(names)]
    assert [len(Y) for _, Y in splits] == [182625, 22655, 22866]

    g = torch.Generator().manual_seed(SEED)
    parameters = ladder.initial_parameters(len(characters), 3, 64, g, SEED)
    assert sum(p.numel() for p in parameters.values()) == 4137
    _, Yb = ladder.minibatch(*splits[0], 32, g)
    assert Yb.tolist() == FIRST_TARGETS


def test_table(names):
    rows, one_shots = comparisons(names)
    assert all(row.maxdiff <= 1e-8 for row in rows + one_shots)
