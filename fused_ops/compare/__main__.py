"""Print the lecture's table: every gradient of `fused_ops.steps`, or of your own backward passes, beside autograd's.

On one minibatch of names.
"""

import argparse

import torch

from fused_ops import compare, data, ladder, steps
from fused_ops.compare import exercise

SEED = 2147483647  # the lecture's

# the rows in the lecture's order, from the loss back to the embedding
# fmt: off
ROWS = (
    "logprobs", "probs", "counts_sum_inv", "counts_sum", "counts", "norm_logits", "logit_maxes", "logits",
    "h", "W2", "b2",
    "hpreact", "bngain", "bnbias", "bnraw", "bnvar_inv", "bnvar", "bndiff2", "bndiff", "bnmeani",
    "hprebn", "embcat", "W1", "b1", "emb", "C",
)
# fmt: on


def values_with_gradients(names, hidden=64, block_size=3, batch_size=32):
    """All values of the network for one minibatch, as `steps.forward` returns them, with autograd's gradients."""
    g = torch.Generator().manual_seed(SEED)
    characters = data.vocabulary(names)
    train_names, _, _ = data.split_names(names)
    X, Y = data.contexts(train_names, characters, block_size)
    parameters = ladder.initial_parameters(len(characters), block_size, hidden, g, SEED)
    Xb, Yb = ladder.minibatch(X, Y, batch_size, g)
    values = steps.forward({name: p.requires_grad_() for name, p in parameters.items()}, Xb, Yb)
    for name in (*ROWS, "loss"):
        values[name].retain_grad()
    values["loss"].backward()
    return values


def solution(values):
    """The gradients of all values by `fused_ops.steps`, and its two gradients in one go: of the logits and hprebn."""
    grads = steps.backward(values)
    dlogits = steps.dlogits_one_shot(values["logits"], values["Yb"])
    dhprebn = steps.dhprebn_one_shot(grads["hpreact"], values["bnraw"], values["bngain"], values["bnvar_inv"])
    return grads, (dlogits, dhprebn)


def compared(name, manual, reference):
    """A row of the table: the comparison, or why there is none."""
    if manual is ...:
        return f"{name:15s} | to do"
    try:
        return compare(name, manual, reference)
    except ValueError as error:
        return f"{name:15s} | {str(error).removeprefix(name + ': ')}"


def comparisons(names, file=None):
    """The comparisons of the 19 intermediates and 7 parameters, then of the two one-shot gradients.

    By `fused_ops.steps`, or by a file as `fused_ops.compare.exercise` takes it.
    """
    values = values_with_gradients(names)
    with torch.no_grad():
        grads, one_shots = exercise.gradients(file, values) if file else solution(values)
    rows = [compared(name, grads.get(name, ...), values[name]) for name in ROWS]
    return rows, [compared(name, d, values[name]) for name, d in zip(("logits", "hprebn"), one_shots, strict=True)]


def main():
    parser = argparse.ArgumentParser(prog="python -m fused_ops.compare", description=__doc__)
    parser.add_argument("file", nargs="?", help="backward passes of your own, as exercises/backprop.py asks for them")
    parser.add_argument("--data", default=data.DEFAULT_PATH, help="names, one a line (default: the shipped ones)")
    args = parser.parse_args()
    try:
        rows, one_shots = comparisons(data.read_names(args.data), args.file)
    except (data.DataError, exercise.ExerciseError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print("step by step", *rows, "", "in one shot", *one_shots, sep="\n")


if __name__ == "__main__":
    main()
