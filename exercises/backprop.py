"""The lecture's exercises 1 to 3: the gradients of its network, for you to write, and a checker.

    .venv/bin/python -m fused_ops.compare exercises/backprop.py

runs every function here on a minibatch of names and sets what it returns beside autograd's gradient, as the lecture's
`cmp` does. What comes back to a function is autograd's, too: a mistake shows where it is made, and nowhere else. Fill
in each `...` from the top, which is the end of the network; where one is left the table says "to do". A function may
take other values of the network as well: add their names to its arguments.

The seven rules at the head of `fused_ops/steps.py` are all that you need, and below them are the solutions.
`python -m fused_ops.compare` without a file shows what the table looks like in the end.

    N  examples in the minibatch        Xb  their contexts, (N, T) character indices     T  characters a context
    V  characters                       Yb  the characters that follow, (N,)             E  embedding size
    H  hidden units                     dx  how the loss changes with x; it has x's shape
"""

import torch  # noqa: F401  (you will want it)

# ------------------------------------------------------------------------- exercise 1: step by step, from the loss back


def loss(dloss, logprobs, Yb):
    """loss = -logprobs[range(N), Yb].mean()"""
    dlogprobs = ...  # (N, V)
    return dlogprobs


def logprobs(dlogprobs, probs):
    """logprobs = probs.log()"""
    dprobs = ...  # (N, V)
    return dprobs


def probs(dprobs, counts, counts_sum_inv):
    """probs = counts * counts_sum_inv"""
    dcounts = ...  # (N, V): what comes back from here alone; the checker adds what comes back from counts_sum
    dcounts_sum_inv = ...  # (N, 1)
    return dcounts, dcounts_sum_inv


def counts_sum_inv(dcounts_sum_inv, counts_sum):
    """counts_sum_inv = counts_sum**-1"""
    dcounts_sum = ...  # (N, 1)
    return dcounts_sum


def counts_sum(dcounts_sum, counts):
    """counts_sum = counts.sum(1, keepdim=True)"""
    dcounts = ...  # (N, V)
    return dcounts


def counts(dcounts, counts):
    """counts = norm_logits.exp()"""
    dnorm_logits = ...  # (N, V)
    return dnorm_logits


def norm_logits(dnorm_logits):
    """norm_logits = logits - logit_maxes"""
    dlogits = ...  # (N, V)
    dlogit_maxes = ...  # (N, 1)
    return dlogits, dlogit_maxes


def logit_maxes(dlogit_maxes, logits):
    """logit_maxes = logits.max(1, keepdim=True).values"""
    dlogits = ...  # (N, V)
    return dlogits


def logits(dlogits, h, W2):
    """logits = h @ W2 + b2"""
    dh = ...  # (N, H)
    dW2 = ...  # (H, V)
    db2 = ...  # (V)
    return dh, dW2, db2


def h(dh, h):
    """h = torch.tanh(hpreact)"""
    dhpreact = ...  # (N, H)
    return dhpreact


def hpreact(dhpreact, bngain, bnraw):
    """hpreact = bngain * bnraw + bnbias"""
    dbngain = ...  # (1, H)
    dbnraw = ...  # (N, H)
    dbnbias = ...  # (1, H)
    return dbngain, dbnraw, dbnbias


def bnraw(dbnraw, bndiff, bnvar_inv):
    """bnraw = bndiff * bnvar_inv"""
    dbndiff = ...  # (N, H)
    dbnvar_inv = ...  # (1, H)
    return dbndiff, dbnvar_inv


def bnvar_inv(dbnvar_inv, bnvar):
    """bnvar_inv = (bnvar + 1e-5) ** -0.5"""
    dbnvar = ...  # (1, H)
    return dbnvar


def bnvar(dbnvar, bndiff2, correction):
    """bnvar = 1 / (N - correction) * bndiff2.sum(0, keepdim=True), where correction is 1"""
    dbndiff2 = ...  # (N, H)
    return dbndiff2


def bndiff2(dbndiff2, bndiff):
    """bndiff2 = bndiff**2"""
    dbndiff = ...  # (N, H)
    return dbndiff


def bndiff(dbndiff):
    """bndiff = hprebn - bnmeani"""
    dhprebn = ...  # (N, H)
    dbnmeani = ...  # (1, H)
    return dhprebn, dbnmeani


def bnmeani(dbnmeani, hprebn):
    """bnmeani = 1 / N * hprebn.sum(0, keepdim=True)"""
    dhprebn = ...  # (N, H)
    return dhprebn


def hprebn(dhprebn, embcat, W1):
    """hprebn = embcat @ W1 + b1"""
    dembcat = ...  # (N, T·E)
    dW1 = ...  # (T·E, H)
    db1 = ...  # (H)
    return dembcat, dW1, db1


def embcat(dembcat, emb):
    """embcat = emb.view(N, T·E)"""
    demb = ...  # (N, T, E)
    return demb


def emb(demb, C, Xb):
    """emb = C[Xb]"""
    dC = ...  # (V, E)
    return dC


# ------------------------------------------------- exercise 2: cross-entropy in one go, with what the steps cancel to


def dlogits_one_shot(logits, Yb):
    """loss = cross_entropy(logits, Yb), all of the steps from `loss` to `logit_maxes`"""
    dlogits = ...  # (N, V)
    return dlogits


# ---------------------------------------------------------------------------------- exercise 3: batch norm in one go


def dhprebn_one_shot(dhpreact, bnraw, bngain, bnvar_inv):
    """hpreact = bngain * (hprebn - mean) * bnvar_inv + bnbias, all of the steps from `hpreact` to `bnmeani`"""
    dhprebn = ...  # (N, H)
    return dhprebn
