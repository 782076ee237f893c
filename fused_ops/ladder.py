"""The rungs of the ladder: one network of names, trained by autograd, by elementary steps, by our fused layers, or in
one op.

Every rung starts from the same parameters, sees the same minibatches and takes the same steps of stochastic gradient
descent, so the losses agree to rounding. Only who works out the gradients differs.
"""

import torch

import fused_ops.nn
from fused_ops import steps

EMBEDDING_SIZE = 10
MOMENTUM = 0.01  # of the running statistics: an average over about the last hundred minibatches


def initial_parameters(vocab_size, block_size, hidden, generator, seed):
    """The lecture's initialisation, in the order in which it draws from its generator; the names of `steps.PARAMETERS`.

    bngain and bnbias, which the lecture draws from a generator it does not seed, come from one of their own here.
    """
    g, fan_in = generator, EMBEDDING_SIZE * block_size
    own = torch.Generator().manual_seed(seed)
    return {
        "C": torch.randn(vocab_size, EMBEDDING_SIZE, generator=g),
        "W1": torch.randn(fan_in, hidden, generator=g) * (5 / 3) / fan_in**0.5,
        "b1": torch.randn(hidden, generator=g) * 0.1,
        "W2": torch.randn(hidden, vocab_size, generator=g) * 0.1,
        "b2": torch.randn(vocab_size, generator=g) * 0.1,
        "bngain": torch.randn(1, hidden, generator=own) * 0.1 + 1.0,
        "bnbias": torch.randn(1, hidden, generator=own) * 0.1,
    }


def initial_state(parameters):
    """The parameters, and the running statistics of a batch norm that has seen no batch."""
    zeros = torch.zeros_like(parameters["bnbias"][0])  # (H)
    return {**parameters, "running_mean": zeros, "running_var": zeros + 1}


def minibatch(X, Y, batch_size, generator):
    """`batch_size` rows of X and Y, drawn with replacement. The draw is made on the CPU, the same for every device."""
    ix = torch.randint(0, len(X), (batch_size,), generator=generator).to(X.device)  # (N)
    return X[ix], Y[ix]


def predict(state, X):
    """The trained network's logits, (N, V), for contexts X, (N, T): batch norm on its running statistics."""
    embcat = state["C"][X].flatten(1)  # (N, T·E)
    hprebn = embcat @ state["W1"] + state["b1"]  # (N, H)
    bnraw = (hprebn - state["running_mean"]) * (state["running_var"] + steps.EPS) ** -0.5  # (N, H)
    return torch.tanh(state["bngain"] * bnraw + state["bnbias"]) @ state["W2"] + state["b2"]  # (N, V)


class Rung:
    """Trains the network; `state` is its parameters and running statistics, by name."""

    def train(self, X, Y, lr, batch_size, steps, generator):
        """That many steps of gradient descent, on a minibatch each; returns their losses, (steps,)."""
        return torch.stack([self.step(*minibatch(X, Y, batch_size, generator), lr) for _ in range(steps)])


class StepsRung(Rung):
    """Every elementary step and its gradient by hand (`fused_ops.steps`), with PyTorch's biased variance."""

    def __init__(self, state):
        self.state = state

    @torch.no_grad()
    def step(self, Xb, Yb, lr):
        """One step of gradient descent on a minibatch; returns its loss, ()."""
        parameters = {name: self.state[name] for name in steps.PARAMETERS}
        values = steps.forward(parameters, Xb, Yb, correction=0)
        grads = steps.backward(values)
        for name, parameter in parameters.items():
            parameter -= lr * grads[name]
        unbiased = len(Xb) / (len(Xb) - 1) * values["bnvar"]  # (1, H)
        self.state["running_mean"].lerp_(values["bnmeani"][0], MOMENTUM)
        self.state["running_var"].lerp_(unbiased[0], MOMENTUM)
        return values["loss"]


class Network(torch.nn.Module):
    """The network from layers: `layers` is the module that BatchNorm1d and CrossEntropyLoss are taken from."""

    def __init__(self, layers, vocab_size, fan_in, hidden):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, EMBEDDING_SIZE)
        self.linear = torch.nn.Linear(fan_in, hidden)
        self.norm = layers.BatchNorm1d(hidden, eps=steps.EPS, momentum=MOMENTUM)
        self.output = torch.nn.Linear(hidden, vocab_size)
        self.criterion = layers.CrossEntropyLoss()

    def forward(self, X, Y):
        embcat = self.embedding(X).flatten(1)  # (N, T·E)
        h = torch.tanh(self.norm(self.linear(embcat)))  # (N, H)
        return self.criterion(self.output(h), Y)  # ()


def state_of(network, state):
    """Give a network the values of `state`; returns the same state, as views of the network's own tensors.

    W1 and W2 are transposed there, bngain and bnbias are rows.
    """
    views = {
        "C": network.embedding.weight.detach(),
        "W1": network.linear.weight.detach().T,
        "b1": network.linear.bias.detach(),
        "W2": network.output.weight.detach().T,
        "b2": network.output.bias.detach(),
        "bngain": network.norm.weight.detach()[None],
        "bnbias": network.norm.bias.detach()[None],
        "running_mean": network.norm.running_mean,
        "running_var": network.norm.running_var,
    }
    for name, values in state.items():
        views[name].copy_(values)
    return views


class LayersRung(Rung):
    """An nn.Module trained by `loss.backward()` and `torch.optim.SGD`."""

    def __init__(self, layers, state):
        vocab_size, (fan_in, hidden) = len(state["C"]), state["W1"].shape
        self.network = Network(layers, vocab_size, fan_in, hidden).to(state["C"].device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.0)
        self.state = state_of(self.network, state)

    def step(self, Xb, Yb, lr):
        """One step of gradient descent on a minibatch; returns its loss, ()."""
        loss = self.network(Xb, Yb)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return loss.detach()


class NetworkRung(Rung):
    """The whole network as one op, and all its steps in one call."""

    def __init__(self, state):
        vocab_size, (fan_in, hidden) = len(state["C"]), state["W1"].shape
        sizes = vocab_size, EMBEDDING_SIZE, fan_in // EMBEDDING_SIZE, hidden
        self.network = fused_ops.nn.MLP(*sizes, eps=steps.EPS, momentum=MOMENTUM).to(state["C"].device)
        self.state = state_of(self.network, state)

    def train(self, X, Y, lr, batch_size, steps, generator):
        return self.network.sgd_steps(X, Y, lr=lr, steps=steps, batch_size=batch_size, generator=generator)


RUNGS = {
    "autograd": lambda state: LayersRung(torch.nn, state),
    "steps": StepsRung,
    "fused": lambda state: LayersRung(fused_ops.nn, state),
    "network": NetworkRung,
}
