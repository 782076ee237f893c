"""Peak memory of a linear layer with cross-entropy, forward and backward, beyond its inputs and their gradients.

Each implementation runs in a process of its own, whose peak resident set is read before and after: `make memory`.
"""

import argparse
import multiprocessing
import platform
import resource
import time

import torch

import fused_ops.functional as F

MIB = 2**20


def eager(input, linear_weight, target):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(input, linear_weight), target)


def chunked(input, linear_weight, target):
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(input, linear_weight, target, options=options)


def fused(input, linear_weight, target):
    return F.linear_cross_entropy(input, linear_weight, target)


def frozen(input, linear_weight, target):
    return F.linear_cross_entropy(input, linear_weight.detach(), target)


IMPLEMENTATIONS = {
    "eager": eager,
    "PyTorch, chunked": chunked,  # from torch 2.13 on
    "fused_ops": fused,
    "fused_ops, frozen weight": frozen,
}


def run(name, rows, features, classes, dtype):
    """MiB beyond inputs and gradients, and seconds."""

    def pass_both_ways(rows, features, classes):
        torch.manual_seed(0)
        input = torch.randn(rows, features, dtype=dtype).requires_grad_()
        linear_weight = torch.randn(classes, features, dtype=dtype).mul_(0.02).requires_grad_()
        target = torch.randint(classes, (rows,))
        before, start = peak(), time.perf_counter()
        IMPLEMENTATIONS[name](input, linear_weight, target).backward()
        gradients = sum(t.grad.nbytes for t in (input, linear_weight) if t.grad is not None)
        return (peak() - before - gradients) / MIB, time.perf_counter() - start

    pass_both_ways(8, 8, 8)  # so that what libraries set up once is not counted
    return pass_both_ways(rows, features, classes)


def peak():
    """The largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048, help="N, examples (default: %(default)s)")
    parser.add_argument("--features", type=int, default=768, help="H, input features (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=32000, help="C, classes (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    args = parser.parse_args()

    print(f"{args.rows} x {args.features} x {args.classes} {args.dtype}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads on {processor()}")
    print(f"{'':26} {'MiB beyond':>10} {'of eager':>8} {'seconds':>8}")
    baseline = None
    for name in IMPLEMENTATIONS:
        if name == "PyTorch, chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            continue
        shape = args.rows, args.features, args.classes, getattr(torch, args.dtype)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory, seconds = pool.apply(run, (name, *shape))
        baseline = memory if baseline is None else baseline
        print(f"{name:26} {memory:10.0f} {memory / baseline:8.1%} {seconds:8.2f}", flush=True)


def processor():
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
