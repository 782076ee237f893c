"""The exercises, unsolved, solved and solved wrongly, as `python -m fused_ops.compare` checks them."""

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_ops import data, steps
from fused_ops.compare.__main__ import ROWS, comparisons

EXERCISES = Path(__file__).parent.parent / "exercises/backprop.py"
NAMES = data.read_names(data.DEFAULT_PATH)
SOLUTIONS = {step.name: step.pull_back for step in steps.STEPS}
SOLUTIONS |= {function.__name__: function for function in (steps.dlogits_one_shot, steps.dhprebn_one_shot)}


def solved(tmp_path, edit=lambda source: source):
    """A file of the solutions, each without the decorator that makes it a step."""
    sources = [inspect.getsource(function) for function in SOLUTIONS.values()]
    plain = [source[source.index("def ") :] for source in sources]
    file = tmp_path / "solved.py"
    file.write_text(edit("\n\n".join(["import torch", "EPS = 1e-5", *plain])), encoding="utf-8")
    return file


def names_of(rows):
    return [row.split(" ")[0] for row in map(str, rows)]


def test_the_exercises_ask_for_what_the_steps_are():
    functions = {name: f for name, f in runpy.run_path(EXERCISES).items() if inspect.isfunction(f)}
    assert list(functions) == [step.name for step in reversed(steps.STEPS)] + ["dlogits_one_shot", "dhprebn_one_shot"]
    for name, function in functions.items():
        theirs = inspect.signature(SOLUTIONS[name]).parameters
        assert [*inspect.signature(function).parameters] == [n for n in theirs if n != "correction" or name == "bnvar"]
        if name in {step.name for step in steps.STEPS}:
            assert function.__doc__.startswith(f"{name} = ")


def test_the_formulas_of_the_exercises_are_those_of_the_steps():
    """Run as they stand, N, T and E being lengths, on the values of the network."""
    generator = torch.Generator().manual_seed(0)
    V, E, T, H, N = 5, 2, 3, 4, 6
    shapes = {"C": (V, E), "W1": (T * E, H), "b1": (H,), "W2": (H, V), "b2": (V,), "bngain": (1, H), "bnbias": (1, H)}
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    Xb, Yb = (torch.randint(V, shape, generator=generator) for shape in ((N, T), (N,)))
    values = steps.forward(parameters, Xb, Yb)
    functions = runpy.run_path(EXERCISES)
    for step in steps.STEPS:
        formula = functions[step.name].__doc__.partition(" = ")[2].partition(", where")[0]
        value = eval(formula.replace("·", "*"), {**values, "torch": torch, "N": N, "T": T, "E": E})
        assert torch.equal(value, values[step.name]), step.name


def test_unsolved_all_are_to_do():
    rows, one_shots = comparisons(NAMES, EXERCISES)
    assert names_of(rows + one_shots) == [*ROWS, "logits", "hprebn"]
    assert all(row.endswith("| to do") for row in rows + one_shots)


def test_solved_all_are_right(tmp_path):
    rows, one_shots = comparisons(NAMES, solved(tmp_path))
    assert names_of(rows + one_shots) == [*ROWS, "logits", "hprebn"]
    assert all(row.approximate and row.maxdiff <= 1e-8 for row in rows + one_shots)


def test_a_mistake_shows_where_it_is_made(tmp_path):
    mistake = lambda source: source.replace("(1.0 - h**2) * dh", "(1.0 + h**2) * dh")  # noqa: E731
    rows, one_shots = comparisons(NAMES, solved(tmp_path, mistake))
    assert [row.name for row in rows + one_shots if not row.approximate] == ["hpreact"]


def test_a_sum_too_few_is_a_shape_that_differs(tmp_path):
    mistake = lambda source: source.replace("db2 = dlogits.sum(0)", "db2 = dlogits")  # noqa: E731
    rows, _ = comparisons(NAMES, solved(tmp_path, mistake))
    assert [str(row) for row in rows if "shapes differ" in str(row)] == [
        "b2              | shapes differ, (32, 27) by hand and (27,)"
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "cannot read the file"),
        ("def h(dh, hpre):\n    return dh", "h: the network has no 'hpre'"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_line(tmp_path, text, error):
    file = tmp_path / "mine.py"
    if text:
        file.write_text(text)
    command = [sys.executable, "-m", "fused_ops.compare", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert error in result.stderr
