"""The network of the lecture "Becoming a backprop ninja" (makemore, part 4) in elementary steps, each with its backward
pass written by hand.

A character-level model of names: the last few characters go through an embedding, a linear layer, batch norm, tanh
and a second linear layer to a distribution over the next character, whose cross-entropy is the loss. Nothing here
calls `loss.backward()`.

    N  examples in the minibatch        Xb  their contexts, (N, T) character indices     T  characters a context
    V  characters                       Yb  the characters that follow, (N,)             E  embedding size
    H  hidden units                     dx  how the loss changes with x; it has x's shape

The rules that every step below uses, each on a line of the network:

1.  **What a gradient is.** dx says how fast the loss changes as one element of x changes, all else as it is. Nudge
    b2[0] by 1e-4, run the network again, and the loss moves by about 1e-4 · db2[0]. (`tests/test_steps.py` does that
    to an element of every value here.)
2.  **The chain rule.** counts = exp(norm_logits), and exp is its own derivative: nudging norm_logits by δ moves counts
    by counts · δ, and so the loss by dcounts · counts · δ. That is, dnorm_logits = counts · dcounts. A step's backward
    pass needs only what comes back to its output and the values it saw.
3.  **A value used in several places sums what comes back from each.** counts is used by counts_sum and by probs; a
    nudge of it moves the loss through both: dcounts is the sum of two terms. The function `backward` does that summing.
4.  **Broadcasting forward is a sum backward.** hprebn = embcat @ W1 + b1 uses b1 once in each row, that is in N
    places, so (rule 3) db1 = dhprebn.sum(0).
5.  **A sum forward is a broadcast backward.** counts_sum adds up a row of counts, so each of them moves it alike:
    every element of the row gets dcounts_sum.
6.  **Indexing forward is a scatter-add backward.** emb = C[Xb] copies rows of C; row k of dC is the sum of demb over
    the places where Xb is k (rule 3 again).
7.  **The gradient of a matrix product is a matrix product.** logits = h @ W2 is (N, V) = (N, H) @ (H, V). It uses
    h[n, j] once for each v, times W2[j, v], so (rule 3) dh[n, j] is the sum of dlogits[n, v] · W2[j, v] over v: dh =
    dlogits @ W2.T. Likewise dW2 = h.T @ dlogits sums over n. The shapes help to remember which is transposed: dh must
    be (N, H), and where N, H and V differ no other product of dlogits and W2 is.

And why a derivative is zero: loss = -logprobs[range(N), Yb].mean() picks one element of each row. Nudge another one
and the loss does not move, so dlogprobs is zero there, and -1/N at the elements picked.

The formulas, and the order of their arithmetic, are the lecture's. `python -m fused_ops.compare` sets every gradient
beside autograd's. To write them yourself first, as the lecture asks you to: `exercises/backprop.py`.
"""

import inspect

import torch

PARAMETERS = ("C", "W1", "b1", "W2", "b2", "bngain", "bnbias")
EPS = 1e-5
STEPS = []  # in the order of the forward pass


class Step:
    """One value of the network: how it is computed and how its gradient goes back.

    Named for the value it computes. `@Step` makes one of the forward function, whose arguments are the values it reads;
    `@<name>.backward` hands it the backward function, as `@property` and its setter do. The arguments of that are the
    gradient of the value, `d` and its name, and any values it needs. It returns the gradients of the forward function's
    arguments, leaving out those at the end that have none (indices, constants).
    """

    def __init__(self, forward):
        self.name, self.forward = forward.__name__, forward
        self.inputs = tuple(inspect.signature(forward).parameters)
        STEPS.append(self)

    def backward(self, function):
        self.pull_back = function
        _, *self.needs = inspect.signature(function).parameters
        return self


def forward(parameters, Xb, Yb, correction=1):
    """Run the network, and return every value by its name: the parameters, the 19 intermediates and the loss.

    Args:
        parameters: the seven tensors of `PARAMETERS`, by name: C (V, E), W1 (T·E, H), b1 (H,), W2 (H, V), b2 (V,),
            bngain and bnbias (1, H).
        Xb: contexts, (N, T), int64.
        Yb: the characters that follow, (N,), int64.
        correction: the variance divides by N - correction: 1 (the lecture) or 0 (PyTorch's batch norm).

    Raises:
        ValueError: fewer than two examples: there is no variance to normalise by.
    """
    if len(Xb) < 2:
        raise ValueError(f"batch norm needs at least two examples to normalise by, got {len(Xb)}")
    values = {**parameters, "Xb": Xb, "Yb": Yb, "correction": correction}
    for step in STEPS:
        values[step.name] = step.forward(*(values[name] for name in step.inputs))
    return values


def backward(values):
    """Take the loss's gradient back through every step. `values` is what `forward` returned.

    Returns the gradients of the 19 intermediates and 7 parameters, by the name of the value they belong to.
    """
    grads = {"loss": torch.ones_like(values["loss"])}
    for step in reversed(STEPS):
        back = step.pull_back(grads[step.name], *(values[name] for name in step.needs))
        for name, grad in zip(step.inputs, back, strict=False):  # inputs at the end may have no gradient
            grads[name] = grads[name] + grad if name in grads else grad
    del grads["loss"]
    return grads


# ------------------------------------------------------------------------------------------- embedding and linear layer


@Step
def emb(C, Xb):
    return C[Xb]  # (N, T, E)


@emb.backward
def emb(demb, C, Xb):
    dC = torch.zeros_like(C)  # (V, E)
    dC.index_put_((Xb,), demb, accumulate=True)  # rule 6
    return (dC,)


@Step
def embcat(emb):
    return emb.view(len(emb), -1)  # (N, T·E)


@embcat.backward
def embcat(dembcat, emb):
    return (dembcat.view(emb.shape),)  # (N, T, E): the same numbers, so the same gradients


@Step
def hprebn(embcat, W1, b1):
    return embcat @ W1 + b1  # (N, H)


@hprebn.backward
def hprebn(dhprebn, embcat, W1):
    dembcat = dhprebn @ W1.T  # (N, T·E), rule 7
    dW1 = embcat.T @ dhprebn  # (T·E, H)
    db1 = dhprebn.sum(0)  # (H), rule 4
    return dembcat, dW1, db1


# ----------------------------------------------------------------------------------------------------------- batch norm


@Step
def bnmeani(hprebn):
    return 1 / len(hprebn) * hprebn.sum(0, keepdim=True)  # (1, H)


@bnmeani.backward
def bnmeani(dbnmeani, hprebn):
    return (1.0 / len(hprebn) * (torch.ones_like(hprebn) * dbnmeani),)  # (N, H), rule 5


@Step
def bndiff(hprebn, bnmeani):
    return hprebn - bnmeani  # (N, H)


@bndiff.backward
def bndiff(dbndiff):
    return dbndiff, (-dbndiff).sum(0, keepdim=True)  # (N, H), (1, H): rule 4


@Step
def bndiff2(bndiff):
    return bndiff**2  # (N, H)


@bndiff2.backward
def bndiff2(dbndiff2, bndiff):
    return ((2 * bndiff) * dbndiff2,)  # (N, H)


@Step
def bnvar(bndiff2, correction):
    return 1 / (len(bndiff2) - correction) * bndiff2.sum(0, keepdim=True)  # (1, H)


@bnvar.backward
def bnvar(dbnvar, bndiff2, correction):
    return ((1.0 / (len(bndiff2) - correction)) * torch.ones_like(bndiff2) * dbnvar,)  # (N, H), rule 5


@Step
def bnvar_inv(bnvar):
    return (bnvar + EPS) ** -0.5  # (1, H)


@bnvar_inv.backward
def bnvar_inv(dbnvar_inv, bnvar):
    return ((-0.5 * (bnvar + EPS) ** -1.5) * dbnvar_inv,)  # (1, H)


@Step
def bnraw(bndiff, bnvar_inv):
    return bndiff * bnvar_inv  # (N, H)


@bnraw.backward
def bnraw(dbnraw, bndiff, bnvar_inv):
    dbndiff = bnvar_inv * dbnraw  # (N, H)
    dbnvar_inv = (bndiff * dbnraw).sum(0, keepdim=True)  # (1, H), rule 4
    return dbndiff, dbnvar_inv


@Step
def hpreact(bngain, bnraw, bnbias):
    return bngain * bnraw + bnbias  # (N, H)


@hpreact.backward
def hpreact(dhpreact, bngain, bnraw):
    dbngain = (bnraw * dhpreact).sum(0, keepdim=True)  # (1, H)
    dbnraw = bngain * dhpreact  # (N, H)
    dbnbias = dhpreact.sum(0, keepdim=True)  # (1, H)
    return dbngain, dbnraw, dbnbias


# --------------------------------------------------------------------------------- nonlinearity and second linear layer


@Step
def h(hpreact):
    return torch.tanh(hpreact)  # (N, H)


@h.backward
def h(dh, h):
    return ((1.0 - h**2) * dh,)  # (N, H)


@Step
def logits(h, W2, b2):
    return h @ W2 + b2  # (N, V)


@logits.backward
def logits(dlogits, h, W2):
    dh = dlogits @ W2.T  # (N, H), rule 7
    dW2 = h.T @ dlogits  # (H, V)
    db2 = dlogits.sum(0)  # (V), rule 4
    return dh, dW2, db2


# -------------------------------------------------------------------------------------------------------- cross-entropy


@Step
def logit_maxes(logits):
    return logits.max(1, keepdim=True).values  # (N, 1)


@logit_maxes.backward
def logit_maxes(dlogit_maxes, logits):
    # Only the largest element of a row moves its maximum. The gradient is zero but for rounding: subtracting the
    # maximum changes no probability, so it cannot change the loss.
    picked = torch.nn.functional.one_hot(logits.max(1).indices, num_classes=logits.shape[1])  # (N, V)
    return (picked * dlogit_maxes,)  # (N, V)


@Step
def norm_logits(logits, logit_maxes):
    return logits - logit_maxes  # (N, V): at most 0, so exp cannot overflow


@norm_logits.backward
def norm_logits(dnorm_logits):
    return dnorm_logits, (-dnorm_logits).sum(1, keepdim=True)  # (N, V), (N, 1): rule 4


@Step
def counts(norm_logits):
    return norm_logits.exp()  # (N, V)


@counts.backward
def counts(dcounts, counts):
    return (counts * dcounts,)  # (N, V), rule 2


@Step
def counts_sum(counts):
    return counts.sum(1, keepdim=True)  # (N, 1)


@counts_sum.backward
def counts_sum(dcounts_sum, counts):
    return (torch.ones_like(counts) * dcounts_sum,)  # (N, V), rule 5


@Step
def counts_sum_inv(counts_sum):
    return counts_sum**-1  # (N, 1)


@counts_sum_inv.backward
def counts_sum_inv(dcounts_sum_inv, counts_sum):
    return ((-(counts_sum**-2)) * dcounts_sum_inv,)  # (N, 1)


@Step
def probs(counts, counts_sum_inv):
    return counts * counts_sum_inv  # (N, V)


@probs.backward
def probs(dprobs, counts, counts_sum_inv):
    dcounts = counts_sum_inv * dprobs  # (N, V): the first of its two terms, rule 3
    dcounts_sum_inv = (counts * dprobs).sum(1, keepdim=True)  # (N, 1), rule 4
    return dcounts, dcounts_sum_inv


@Step
def logprobs(probs):
    return probs.log()  # (N, V)


@logprobs.backward
def logprobs(dlogprobs, probs):
    return ((1.0 / probs) * dlogprobs,)  # (N, V)


@Step
def loss(logprobs, Yb):
    return -logprobs[range(len(Yb)), Yb].mean()  # ()


@loss.backward
def loss(dloss, logprobs, Yb):
    dlogprobs = torch.zeros_like(logprobs)  # (N, V): zero where the loss does not look
    dlogprobs[range(len(Yb)), Yb] = -1.0 / len(Yb) * dloss
    return (dlogprobs,)


# ------------------------------------------------------------------------------------------ the one-shot gradients


def dlogits_one_shot(logits, Yb):
    """Cross-entropy's backward in one go: the eight steps from dloss back to dlogits cancel to (softmax − one-hot)/N.

    Step by step, in a row with the target y:

        dlogprobs       = −1/N at y, else 0
        dprobs          = −1/(N·probs_y) at y, else 0
        dcounts_sum_inv = counts_y·dprobs_y = −counts_sum/N            since probs_y = counts_y/counts_sum
        dcounts_sum     = −dcounts_sum_inv/counts_sum² = 1/(N·counts_sum)
        dcounts         = 1/(N·counts_sum), and dprobs_y/counts_sum = −1/(N·counts_y) more at y
        dnorm_logits    = counts·dcounts = probs/N, and −1/N more at y
        dlogit_maxes    = −Σ dnorm_logits = −(1 − 1)/N = 0             so dlogits = dnorm_logits

    Or at once: the loss is the mean of lse(logits) − logits[Yb], with lse = log Σ exp. The gradient of lse is softmax,
    that of logits[Yb] is 1 at the target. Each row pulls its target up and pushes every character down by its
    probability, in balance. In numbers, with the probabilities ¼ ½ ¼ and 4/10 1/10 5/10, and the targets 1 and 0:

        >>> logits, Yb = torch.tensor([[1.0, 2.0, 1.0], [4.0, 1.0, 5.0]]).log(), torch.tensor([1, 0])
        >>> dlogits_one_shot(logits, Yb)
        tensor([[ 0.1250, -0.2500,  0.1250],
                [-0.3000,  0.0500,  0.2500]])

    Nudge the last logit by 0.01, and (rule 1) the loss moves by about 0.01 · 0.25:

        >>> cross_entropy, nudge = torch.nn.functional.cross_entropy, 0.01 * torch.tensor([[0, 0, 0], [0, 0, 1]])
        >>> round((cross_entropy(logits + nudge, Yb) - cross_entropy(logits, Yb)).item(), 4)
        0.0025

    Args: logits (N, V); Yb (N,). Returns dlogits (N, V). `fused_ops.ops.cross_entropy` derives every form of the loss.
    """
    dlogits = torch.softmax(logits, 1)  # (N, V)
    dlogits[range(len(Yb)), Yb] -= 1
    return dlogits / len(Yb)


def dhprebn_one_shot(dhpreact, bnraw, bngain, bnvar_inv, correction=1):
    """Batch norm's backward in one go: the steps from dhpreact back to dhprebn.

    Step by step, with r for bnvar_inv, so that bnraw = bndiff·r, and sums over the rows:

        dbnraw   = bngain·dhpreact
        dbnvar   = −½·r³·Σ bndiff·dbnraw
        dbndiff  = r·dbnraw + 2·bndiff·dbnvar/(N − correction)
                 = r·(dbnraw − bnraw·Σ bnraw·dbnraw/(N − correction))
        dbnmeani = −Σ dbndiff = −r·Σ dbnraw                            since Σ bnraw = 0
        dhprebn  = dbndiff + dbnmeani/N

    Put together, and with bngain/N taken out:

        dhprebn = bngain·r/N·(N·dhpreact − Σ dhpreact − N/(N − correction)·bnraw·Σ dhpreact·bnraw)

    The mean and the variance depend on every row, and so what would move them is taken out of dhpreact: its mean, and
    its part along bnraw.

    Args: dhpreact and bnraw (N, H); bngain and bnvar_inv (1, H); correction 1 for the lecture's unbiased variance, 0
    for PyTorch's biased one, as in `fused_ops.ops.batch_norm`. Returns dhprebn (N, H).
    """
    N = len(dhpreact)
    dhpreact_sum = dhpreact.sum(0)  # (H)
    along_bnraw = N / (N - correction) * bnraw * (dhpreact * bnraw).sum(0)  # (N, H)
    return bngain * bnvar_inv / N * (N * dhpreact - dhpreact_sum - along_bnraw)  # (N, H)
