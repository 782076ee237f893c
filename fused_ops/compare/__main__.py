"""Print the lecture's table: every gradient of `fused_ops.steps` beside autograd's, on one minibatch of names."""

import argparse

import torch

from fused_ops import compare, data, ladder, steps

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


def comparisons(names, hidden=64, block_size=3, batch_size=32):
    """The comparisons of the 19 intermediates and 7 parameters, then of the two one-shot gradients."""
    g = torch.Generator().manual_seed(SEED)
    characters = data.vocabulary(names)
    train_names, _, _ = data.split_names(names)
    X, Y = data.contexts(train_names, characters, block_size)
    parameters = ladder.initial_parameters(len(characters), block_size, hidden, g, SEED)
    Xb, Yb = ladder.minibatch(X, Y, batch_size, g)

    values = steps.forward({name: p.requires_grad_() for name, p in parameters.items()}, Xb, Yb)
    for name in ROWS:
        values[name].retain_grad()
    values["loss"].backward()  # autograd's, to compare with
    with torch.no_grad():
        grads = steps.backward(values)
        dlogits = steps.dlogits_one_shot(values["logits"], Yb)
        dhprebn = steps.dhprebn_one_shot(grads["hpreact"], values["bnraw"], values["bngain"], values["bnvar_inv"])
        rows = [compare(name, grads[name], values[name]) for name in ROWS]
        one_shots = [compare("logits", dlogits, values["logits"]), compare("hprebn", dhprebn, values["hprebn"])]
    return rows, one_shots


def main():
    parser = argparse.ArgumentParser(prog="python -m fused_ops.compare", description=__doc__)
    parser.add_argument("--data", default=data.DEFAULT_PATH, help="names, one a line (default: the shipped ones)")
    args = parser.parse_args()
    try:
        rows, one_shots = comparisons(data.read_names(args.data))
    except data.DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print("step by step", *rows, "", "in one shot", *one_shots, sep="\n")


if __name__ == "__main__":
    main()
