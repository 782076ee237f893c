"""Compile the CUDA kernels for each generation of cards and write what they take to docs/cuda.md. `make cuda-report`.

It needs nvcc and no card. It fails where a kernel spills registers to memory, and names it.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup  # noqa: E402

PAGE = ROOT / "docs/cuda.md"
MARK = "<!-- The rest is written by `make cuda-report`. -->\n"
CARDS = {"75": "T4", "80": "A100", "90": "H100", "100": "B200"}
CAPTION = """\
## What the kernels take

As nvcc {version} compiles them, for {cards}. A line is the most that a
kernel takes for any set of its template arguments; how many there are is in the second column. Spilled
are registers, to memory.

| kernel | kinds | registers: {names} | static shared memory, bytes | spilled, bytes |
| - | - | {dashes} | - | - |
"""


class Kernel(NamedTuple):
    name: str
    is_double: bool
    registers: int
    shared: int
    spilled: int


def compiled(nvcc, source, card):
    """The kernels of one file, one for each set of template arguments."""
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, *setup.NVCC, *includes, f"-arch=sm_{card}", "-Xptxas=-v", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, source, "-o", f"{folder}/kernels.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    # ptxas has a paragraph for each kernel
    return [kernel(paragraph) for paragraph in result.stderr.split("Compiling entry function ")[1:]]


def kernel(paragraph):
    """`paragraph`: 'mangled name' for 'sm_90' ... N bytes spill stores, ... Used N registers, ... N bytes smem"""
    mangled = paragraph.partition("'")[2].partition("'")[0]
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name, _, arguments = name.partition("(anonymous namespace)::")[2].partition("<")

    def number(pattern):
        return sum(map(int, re.findall(pattern, paragraph)))

    spilled = number(r"(\d+) bytes spill stores")
    return Kernel(
        name,
        "double" in arguments.partition(">(")[0],
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes smem"),
        spilled,
    )


def rows(kernels):
    """Lines of the table, float64 apart from the other dtypes."""
    groups = defaultdict(lambda: defaultdict(list))
    for card, k in kernels:
        groups[k.name, k.is_double][card].append(k)
    for (name, is_double), of_card in sorted(groups.items()):
        registers = (max(k.registers for k in of_card[card]) for card in CARDS)
        every = [k for card in CARDS for k in of_card[card]]
        kinds, shared, spilled = len(every) // len(CARDS), max(k.shared for k in every), max(k.spilled for k in every)
        cells = f"`{name}`{', float64' if is_double else ''}", kinds, *registers, shared, spilled
        yield f"| {' | '.join(map(str, cells))} |\n"


def main():
    toolkit = setup.find_cuda_toolkit() or sys.exit("no nvcc found")
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    jobs = [(source, card) for source in sources for card in CARDS]
    nvcc = toolkit / "bin/nvcc"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(nvcc, *job), jobs))
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout

    table = CAPTION.format(
        version=re.search(r"release [\d.]+, V([\d.]+)", version)[1],
        cards=", ".join(f"sm_{card} ({example})" for card, example in CARDS.items()),
        names=" | ".join(f"sm_{card}" for card in CARDS),
        dashes=" | ".join("-" for _ in CARDS),
    )
    by_source = defaultdict(list)
    for (source, card), kernels in zip(jobs, results, strict=True):
        by_source[source] += [(card, k) for k in kernels]
    table += "".join(line for source in sources for line in rows(by_source[source]))
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n{table}", encoding="utf-8")

    spilling = [
        f"sm_{card}: {k}" for (_, card), kernels in zip(jobs, results, strict=True) for k in kernels if k.spilled
    ]
    if spilling:
        sys.exit("\n".join(["these kernels spill registers to memory:", *spilling]))


if __name__ == "__main__":
    main()
