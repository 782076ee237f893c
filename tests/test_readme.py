"""The examples of the README and of docs/recipes.md, as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
ONE_LINERS = re.findall(r'^\.venv/bin/python -c "(.*?)"$', README, re.DOTALL | re.MULTILINE)
NAMES = ["hessian-vector product", "per-sample gradients", "compiled network"]
NEEDS_TORCH_2_13 = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"),
    reason=f"torch {torch.__version__} has no nn.functional.linear_cross_entropy to compare with",
)


def python_of(page):
    return re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def test_the_drop_in_layers_train():
    (example,) = python_of(README)
    names = {}
    exec(example, names)
    assert all(p.grad.isfinite().all() for p in names["model"].parameters())


def test_the_recipes_run():
    """They compare with torch themselves."""
    names, recipes = {}, python_of(RECIPES)
    assert len(recipes) == 5
    for recipe in recipes:
        exec(recipe, names)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=name, marks=NEEDS_TORCH_2_13 if "linear_cross_entropy" in code else [])
        for code, name in zip(ONE_LINERS, NAMES, strict=True)
    ],
)
def test_one_liners_agree_with_torch(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 1e-5
