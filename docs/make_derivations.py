"""Write docs/derivations.md: the docstrings that derive the gradients, in reading order. `make docs` runs it.

It reads the sources and imports none of them, so any Python runs it. `tests/test_derivations.py` keeps the page fresh.
"""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/derivations.md"
OPS = "fused_ops/ops/"

TITLE = "# Derivations"
INTRODUCTION = """\
How every gradient of `fused_ops` is derived: the rules that all of it rests on, and then, op by op, the forward
formula, the first derivative, and the second derivatives with forward mode. `make docs` collects this page from the
docstrings of the files it names, which are the text to edit. The tests prove the formulas in them by sympy, and compare
them with the code. Symbols hold within one section.

Whoever comes from the lecture reads the rules, and beside them [steps.py](../fused_ops/steps.py), does the exercises,
[exercises/backprop.py](../exercises/backprop.py), and goes on with the forward formula and first derivative of
cross-entropy, of batch norm and of the whole network; the rest can wait. Its words: a gradient says how fast the loss
moves with each input; *forward mode* asks how fast everything moves where the inputs move in one given direction. How
fast q moves, its *tangent*, is written d(q), q̇ or q_t. A second derivative is a derivative of the gradient: *reverse
over reverse* takes a gradient back through the backward pass, *forward over reverse* moves the backward pass in one
direction. The *accumulate dtype* is float32 for tensors of 16 bits, else their own."""

# heading, file, and the names in it whose docstrings to take; None is the file's own
SECTIONS = (
    ("## The rules", "fused_ops/steps.py", (None,)),
    ("### From the steps to one go", "fused_ops/steps.py", ("dlogits_one_shot", "dhprebn_one_shot")),
    ("## Cross-entropy", OPS + "cross_entropy.py", (None,)),
    ("### Forward", OPS + "cross_entropy.py", ("cross_entropy_forward",)),
    ("### First derivative", OPS + "cross_entropy.py", ("cross_entropy_backward",)),
    ("### Second derivatives and forward mode", OPS + "cross_entropy_derivatives.py", (None,)),
    ("## Linear cross-entropy", OPS + "linear_cross_entropy.py", (None,)),
    ("### Forward", OPS + "linear_cross_entropy.py", ("linear_cross_entropy_forward",)),
    ("### First derivative", OPS + "linear_cross_entropy.py", ("linear_cross_entropy_backward",)),
    ("### In chunks", OPS + "linear_cross_entropy_chunks.py", (None,)),
    ("### Second derivatives and forward mode", OPS + "linear_cross_entropy_derivatives.py", (None,)),
    ("## Batch norm", OPS + "batch_norm.py", (None,)),
    ("### Forward", OPS + "batch_norm.py", ("batch_norm_forward",)),
    ("### First derivative", OPS + "batch_norm.py", ("batch_norm_backward",)),
    (
        "### Second derivatives and forward mode",
        OPS + "batch_norm_derivatives.py",
        (None, "Point.along", "output_along", "gradients_along", "gradients_pulled_back"),
    ),
    ("### Activations", OPS + "_activations.py", (None, "Relu", "LeakyRelu", "Tanh", "Gelu", "Silu")),
    ("## The whole network", OPS + "mlp.py", (None,)),
    ("### Forward and first derivative", OPS + "mlp.py", ("mlp_loss_and_gradients",)),
)


PICTURED = "## The rules"
PICTURE = """\
The network, from its parameters down to the loss. Gradients go the other way along the same arrows; where a
value has several (bold), it sums what comes back from each (rule 3)."""


def page():
    """The whole page, as Markdown."""
    blocks, previous = [TITLE, INTRODUCTION], None
    for heading, file, names in SECTIONS:
        blocks += [heading] if file == previous else [heading, f"From [{Path(file).name}](../{file})."]
        previous = file
        source = (ROOT / file).read_text(encoding="utf-8")
        tree = ast.parse(source)
        nodes = {node.name: node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        nodes[None] = tree
        for name in names:
            if name is not None and len(names) > 1:
                blocks.append(f"**`{name}`**")
            blocks += markdown(ast.get_docstring(nodes[name and name.rpartition(".")[2]]))
        if heading == PICTURED:
            blocks += [PICTURE, picture(source, tree)]
    return "\n\n".join(blocks) + "\n"


def picture(source, tree):
    """The steps of the network as a diagram: each value with its shape, and an arrow to each that is made of it."""
    steps, uses = {}, Counter()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and [d for d in node.decorator_list if getattr(d, "id", None) == "Step"]:
            returned = source.splitlines()[node.body[-1].lineno - 1]
            steps[node.name] = [a.arg for a in node.args.args], re.search(r"# (\([^:]*\))", returned)[1]
            uses.update(steps[node.name][0])
    lines = ["flowchart TB"]
    for name, (inputs, shape) in steps.items():
        lines.append(f'    {name}["{name} {shape}"]')
        lines += [f"    {value} --> {name}" for value in inputs if value != "correction"]
    lines.append("    classDef several font-weight:bold,stroke-width:3px")
    lines.append(f"    class {','.join(name for name in steps if uses[name] > 1)} several")
    return "\n".join(["```mermaid", *lines, "```"])


def markdown(docstring):
    """A docstring's paragraphs; neighbours that are indented are one block of code."""
    blocks = []
    for paragraph in docstring.split("\n\n"):
        lines = paragraph.splitlines()
        if not all(line.startswith("    ") for line in lines):
            blocks.append(re.sub(r"`([\w./]+)`", linked, paragraph))
            continue
        code = "\n".join(line[4:] for line in lines)
        if blocks and blocks[-1].endswith("\n```"):
            blocks[-1] = f"{blocks[-1].removesuffix('```')}\n{code}\n```"
        else:
            blocks.append(f"```text\n{code}\n```")
    return blocks


def linked(name):
    """A name in backticks, as a link if it is that of a file or module here."""
    module = name[1].replace(".", "/") + ".py"
    for file in (name[1], module, OPS + module):
        if file.endswith(".py") and (ROOT / file).is_file():
            return f"[{name[0]}](../{file})"
    return name[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
