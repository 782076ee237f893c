"""The peers of docs/peers.md: other libraries' fused ops, measured on CUDA beside ours where they are installed.

Each function here imports a peer's op and returns it, as a function of the case's tensors, as a user would call it. The
version is the one whose source it was written for; on a card none has been run yet. There is none for batch norm: those
of apex and inplace_abn take other dtypes or compute another function (docs/peers.md).
"""

import functools
from dataclasses import dataclass
from importlib import metadata, util
from typing import Callable


def liger_cross_entropy():  # 0.8.2
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def quack_cross_entropy():  # 0.6.4
    from quack.cross_entropy import cross_entropy

    return cross_entropy


def flash_attention_cross_entropy():  # 2.8.4
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()


def apex_cross_entropy():  # 25.09
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    def mean(input, target):
        smoothing, ignore_index = 0.0, -100  # of which the latter is 0 by default
        return SoftmaxCrossEntropyLoss.apply(input, target, smoothing, ignore_index).mean()

    return mean


def liger_linear_cross_entropy():  # 0.8.2
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def quack_linear_cross_entropy():  # 0.6.4
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def cut_linear_cross_entropy():  # 25.6.4
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


@dataclass(frozen=True)
class Peer:
    package: str  # as Python imports it
    load: Callable
    overwrites: bool = False  # its inputs

    @property
    def function(self):
        """The op, imported by its first call: there an import that fails counts as an op that fails."""
        load = functools.cache(self.load)
        return lambda *args: load()(*args)


PEERS = {
    "cross_entropy": {
        "Liger": Peer("liger_kernel", liger_cross_entropy, overwrites=True),
        "quack": Peer("quack", quack_cross_entropy),
        "flash-attention": Peer("flash_attn", flash_attention_cross_entropy),
        "apex": Peer("apex", apex_cross_entropy),
    },
    "linear_cross_entropy": {
        "Liger": Peer("liger_kernel", liger_linear_cross_entropy),
        "quack": Peer("quack", quack_linear_cross_entropy),
        "Cut Cross-Entropy": Peer("cut_cross_entropy", cut_linear_cross_entropy),
    },
}


def installed(op):
    """The peers of this op that Python finds, by name; whether they can be imported is not known before they are."""
    return {name: peer for name, peer in PEERS.get(op, {}).items() if util.find_spec(peer.package)}


def versions():
    """Of the packages found, where their metadata tell: "liger_kernel 0.8.2, quack 0.6.4"."""
    packages = dict.fromkeys(peer.package for op in PEERS for peer in installed(op).values())
    distributions = metadata.packages_distributions() if packages else {}  # reads the metadata of all that is installed
    found = {package: sorted(set(distributions.get(package, []))) for package in packages}
    return ", ".join(" ".join([package, *map(metadata.version, names)]) for package, names in found.items())
