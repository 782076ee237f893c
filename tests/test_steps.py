"""The unfused ladder: every hand-written gradient against the lecture's, autograd's, and a nudge."""

import doctest
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as tF
from torch.testing import assert_close

import fused_ops
from fused_ops import data, ladder, steps
from fused_ops.compare.__main__ import ROWS, SEED, comparisons


def minibatch_of_names(dtype=torch.float32, hidden=64, batch_size=32):
    names = data.read_names(data.DEFAULT_PATH)
    characters = data.vocabulary(names)
    X, Y = data.contexts(data.split_names(names)[0][:2000], characters, block_size=3)
    g = torch.Generator().manual_seed(SEED)
    parameters = ladder.initial_parameters(len(characters), 3, hidden, g, SEED)
    parameters = {name: p.to(dtype).requires_grad_() for name, p in parameters.items()}
    return parameters, *ladder.minibatch(X, Y, batch_size, g)


def lecture_gradients(v):
    """The lecture's backward pass, line by line as it is written there (emb's loop included)."""
    C, W1, W2, bngain = v["C"], v["W1"], v["W2"], v["bngain"]
    Xb, Yb, n = v["Xb"], v["Yb"], len(v["Yb"])
    logits, counts, probs, logprobs = v["logits"], v["counts"], v["probs"], v["logprobs"]
    counts_sum, counts_sum_inv, h, hprebn = v["counts_sum"], v["counts_sum_inv"], v["h"], v["hprebn"]
    bnraw, bndiff, bndiff2, bnvar, bnvar_inv = v["bnraw"], v["bndiff"], v["bndiff2"], v["bnvar"], v["bnvar_inv"]
    emb, embcat = v["emb"], v["embcat"]

    dlogprobs = torch.zeros_like(logprobs)
    dlogprobs[range(n), Yb] = -1.0 / n
    dprobs = (1.0 / probs) * dlogprobs
    dcounts_sum_inv = (counts * dprobs).sum(1, keepdim=True)
    dcounts = counts_sum_inv * dprobs
    dcounts_sum = (-(counts_sum**-2)) * dcounts_sum_inv
    dcounts += torch.ones_like(counts) * dcounts_sum
    dnorm_logits = counts * dcounts
    dlogits = dnorm_logits.clone()
    dlogit_maxes = (-dnorm_logits).sum(1, keepdim=True)
    dlogits += tF.one_hot(logits.max(1).indices, num_classes=logits.shape[1]) * dlogit_maxes
    dh = dlogits @ W2.T
    dW2 = h.T @ dlogits
    db2 = dlogits.sum(0)
    dhpreact = (1.0 - h**2) * dh
    dbngain = (bnraw * dhpreact).sum(0, keepdim=True)
    dbnraw = bngain * dhpreact
    dbnbias = dhpreact.sum(0, keepdim=True)
    dbndiff = bnvar_inv * dbnraw
    dbnvar_inv = (bndiff * dbnraw).sum(0, keepdim=True)
    dbnvar = (-0.5 * (bnvar + 1e-5) ** -1.5) * dbnvar_inv
    dbndiff2 = (1.0 / (n - 1)) * torch.ones_like(bndiff2) * dbnvar
    dbndiff += (2 * bndiff) * dbndiff2
    dhprebn = dbndiff.clone()
    dbnmeani = (-dbndiff).sum(0, keepdim=True)
    dhprebn += 1.0 / n * (torch.ones_like(hprebn) * dbnmeani)
    dembcat = dhprebn @ W1.T
    dW1 = embcat.T @ dhprebn
    db1 = dhprebn.sum(0)
    demb = dembcat.view(emb.shape)
    dC = torch.zeros_like(C)
    for k in range(Xb.shape[0]):
        for j in range(Xb.shape[1]):
            dC[Xb[k, j]] += demb[k, j]
    gradients = locals()
    return {name: gradients["d" + name] for name in ROWS}


def test_every_gradient_is_the_lectures_bit_for_bit():
    with torch.no_grad():
        values = steps.forward(*minibatch_of_names())
        grads = steps.backward(values)
        expected = lecture_gradients(values)
    assert grads.keys() == expected.keys() == set(ROWS)
    assert len(grads) == 19 + 7
    for name in ROWS:
        assert torch.equal(grads[name], expected[name]), name


def test_table_is_exact_up_to_tanh_and_within_1e_8_after_it():
    rows, one_shots = comparisons(data.read_names(data.DEFAULT_PATH))
    assert [row.name for row in rows] == list(ROWS)
    assert all(row.exact for row in rows[: ROWS.index("hpreact")])
    assert all(row.approximate and row.maxdiff <= 1e-8 for row in rows + one_shots)
    assert [row.name for row in one_shots] == ["logits", "hprebn"]


@pytest.mark.parametrize("correction", [0, 1])
def test_every_gradient_is_autograds(correction):
    values = steps.forward(*minibatch_of_names(torch.float64), correction=correction)
    for name in ROWS:
        values[name].retain_grad()
    values["loss"].backward()
    with torch.no_grad():
        grads = steps.backward(values)
        one_shot = steps.dhprebn_one_shot(
            grads["hpreact"], values["bnraw"], values["bngain"], values["bnvar_inv"], correction
        )
        assert_close(one_shot, grads["hprebn"])
        assert_close(steps.dlogits_one_shot(values["logits"], values["Yb"]), grads["logits"])
    for name in ROWS:
        assert_close(grads[name], values[name].grad)


@pytest.mark.parametrize("correction", [0, 1])
def test_every_line_of_the_one_shot_gradients(correction):
    """What their docstrings say of each step between, beside the steps' own gradients."""
    with torch.no_grad():
        v = steps.forward(*minibatch_of_names(torch.float64), correction=correction)
        grads = steps.backward(v)
        N, r, probs, bndiff, bnraw = len(v["Yb"]), v["bnvar_inv"], v["probs"], v["bndiff"], v["bnraw"]
        at_y = tF.one_hot(v["Yb"], probs.shape[1]).double()
        dbnraw = v["bngain"] * grads["hpreact"]
        lines = {
            "logprobs": -at_y / N,
            "probs": -at_y / (N * probs),
            "counts_sum_inv": -v["counts_sum"] / N,
            "counts_sum": 1 / (N * v["counts_sum"]),
            "counts": 1 / (N * v["counts_sum"]) - at_y / (N * v["counts"]),
            "norm_logits": probs / N - at_y / N,
            "logit_maxes": torch.zeros_like(v["logit_maxes"]),
            "bnraw": dbnraw,
            "bnvar": -0.5 * r**3 * (bndiff * dbnraw).sum(0),
            "bndiff": r * (dbnraw - bnraw * (bnraw * dbnraw).sum(0) / (N - correction)),
            "bnmeani": -r * dbnraw.sum(0),
            "hprebn": grads["bndiff"] + grads["bnmeani"] / N,
        }
    for name, gradient in lines.items():
        assert_close(gradient, grads[name], msg=name)


def test_the_example_in_numbers():
    assert doctest.testmod(steps) == (0, 4)


@pytest.mark.parametrize("name", [*steps.PARAMETERS, *ROWS])
def test_a_nudge_moves_the_loss_by_the_gradient(name):
    """Rule 1 of `fused_ops.steps`, on one element of every value: run on from there, and look."""
    with torch.no_grad():
        values = steps.forward(*minibatch_of_names(torch.float64, hidden=16, batch_size=8), correction=1)
        grads = steps.backward(values)

        def loss_after(nudge):
            nudged = dict(values)
            nudged[name] = values[name].clone()
            nudged[name].view(-1)[index] += nudge
            first = next((i for i, step in enumerate(steps.STEPS) if step.name == name), -1) + 1
            for step in steps.STEPS[first:]:
                nudged[step.name] = step.forward(*(nudged[n] for n in step.inputs))
            return nudged["loss"].item()

        index = grads[name].abs().argmax().item()
        slope = (loss_after(1e-5) - loss_after(-1e-5)) / 2e-5
    assert slope == pytest.approx(grads[name].view(-1)[index].item(), rel=1e-4, abs=1e-9)


def test_one_example_is_refused():
    parameters, Xb, Yb = minibatch_of_names()
    with pytest.raises(ValueError, match="at least two"):
        steps.forward(parameters, Xb[:1], Yb[:1])


def test_compare_reports_what_it_finds():
    a = torch.tensor([1.0, 2.0])
    same, near, far = (fused_ops.compare("a", a + d, a) for d in (0.0, 1e-6, 0.5))
    assert same == ("a", True, True, 0.0)
    assert (near.exact, near.approximate) == (False, True)
    assert (far.exact, far.approximate, far.maxdiff) == (False, False, 0.5)
    assert str(far) == "a               | exact: False | approximate: False | maxdiff: 0.5"
    nan = fused_ops.compare("a", a * torch.nan, a * torch.nan)
    assert not nan.exact
    with pytest.raises(ValueError, match="shapes differ"):
        fused_ops.compare("a", a, a[None])
    with pytest.raises(ValueError, match="no .grad"):
        fused_ops.compare("a", a, a.clone().requires_grad_())


def test_table_from_the_command_line():
    command = [sys.executable, "-m", "fused_ops.compare"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split(" ")[0] for line in result.stdout.splitlines() if "maxdiff" in line] == [
        *ROWS,
        "logits",
        "hprebn",
    ]
    assert result.stderr == ""
    result = subprocess.run([*command, "--data", "no/such/file"], capture_output=True, text=True, check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
