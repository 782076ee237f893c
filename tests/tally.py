"""Counts the cases that the conformance suites try, per op and check, and makes tables of the counts.

A test leaves its counts in its report, so they also arrive from the processes of pytest-xdist.
"""

import collections
import platform

import hypothesis
import pytest
import torch

PROPERTY = "conformance"

# What each suite checks, in the order of its table's columns.
SUITES = {
    "OpInfo": {
        "samples": "output, gradients and the tensors that are written to match torch's, in every float dtype",
        "non-contiguous": "the same with inputs and cotangents that are not contiguous",
        "gradcheck": "reverse mode against finite differences",
        "forward AD": "forward mode against finite differences",
        "vmap": "reverse mode under vmap, over cotangents",
        "vmap forward": "forward mode under vmap, over tangents",
        "gradgradcheck": "second derivatives, reverse over reverse mode, also under vmap",
        "fwd over rev": "second derivatives, forward over reverse mode",
        "errors": "the entry's error inputs raise what torch's function raises, in the entry's words",
        "complex": "complex inputs are refused",
    },
    "ModuleInfo": {
        "samples": "after load_state_dict: output, gradients and buffers match torch's, in every float dtype",
        "non-contiguous": "the same with inputs and cotangents that are not contiguous",
        "gradcheck": "reverse mode against finite differences, by inputs and parameters",
        "forward AD": "forward mode against finite differences",
        "vmap": "reverse mode under vmap, over cotangents",
        "gradgradcheck": "second derivatives, reverse over reverse mode",
        "fwd over rev": "second derivatives, forward over reverse mode",
        "pickle": "a pickled module loads with the same state and gives the same output",
        "errors": "the entry's error inputs raise what torch's module raises, in the entry's words",
    },
    "hypothesis": {
        "value and gradients": "of drawn shapes, strides, dtypes and options, against torch's function in float64",
    },
}


class Tally:
    """The counts of one test, left in its report."""

    def __init__(self, properties):
        self.properties = properties

    def count(self, suite, row, checks, cases):
        for check in checks:
            assert check in SUITES[suite]
            self.properties.append((PROPERTY, [suite, row, check, cases, ""]))

    def note(self, suite, row, checks, reason):
        """The reason why torch's own suite leaves a check out, or why ours tries fewer cases."""
        for check in checks:
            self.properties.append((PROPERTY, [suite, row, check, 0, reason]))

    def try_all(self, suite, row, checks, cases, check):
        """Run `check` on each (name, case); fail with the names of all that failed. Fails if there is no case."""
        failures, tried = [], 0
        for name, case in cases:
            tried += 1
            try:
                check(case)
            except (Exception, pytest.fail.Exception) as failure:
                failures.append((name, failure))
        self.count(suite, row, checks, tried)
        assert tried > 0, "no case was tried"
        if failures:
            lines = [
                f"{name}: {(str(failure) or type(failure).__name__).splitlines()[0]}" for name, failure in failures
            ]
            message = f"{len(failures)} of {tried} cases failed, the first with the traceback above:\n"
            raise AssertionError(message + "\n".join(lines)) from failures[0][1]


class Table:
    """The counts of all reports: those of one suite, row (op or module) and check are added."""

    def __init__(self, reports):
        self.counts, self.reasons = collections.Counter(), {}
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    if name == PROPERTY:
                        self.add(*value)

    def add(self, suite, row, check, cases, reason):
        self.counts[suite, row, check] += cases
        if reason:
            self.reasons.setdefault(reason, set()).add((suite, row, check))

    def rows(self, suite):
        """The header and one line of cells for each row."""
        checks = list(SUITES[suite])
        yield [suite, *checks]
        for row in sorted({row for s, row, _ in self.counts if s == suite}):
            yield [row, *(self.cell(suite, row, check) for check in checks)]

    def cell(self, suite, row, check):
        marks = [str(i) for i, cells in enumerate(self.reasons.values(), 1) if (suite, row, check) in cells]
        cases = self.counts.get((suite, row, check), 0) or "-"
        return f"{cases}{' (' + ', '.join(marks) + ')' if marks else ''}"

    def suites(self):
        return [suite for suite in SUITES if any(s == suite for s, _, _ in self.counts)]

    def text(self):
        """Aligned lines for the terminal."""
        for suite in self.suites():
            rows = list(self.rows(suite))
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
                yield "  ".join(cells)
            yield ""
        for i, reason in enumerate(self.reasons, 1):
            yield f"({i}) {reason}"

    def markdown(self, command):
        yield "# Conformance\n"
        yield "PyTorch's own cases (`torch.testing._internal`) and drawn ones, run against the functions and modules of"
        yield "this package: how many cases were tried per op and check. All passed, or this file would not have been"
        yield f"written. PyTorch {torch.__version__}, hypothesis {hypothesis.__version__}, {platform.machine()}."
        yield f"Made by\n\n    {command}"
        for suite in self.suites():
            yield ""
            header, *rows = self.rows(suite)
            yield f"## {suite}\n"
            yield "| " + " | ".join(["", *header[1:]]) + " |"
            yield "|---" + "|--:" * len(header[1:]) + "|"
            for row in rows:
                yield "| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |"
            yield ""
            for check, meaning in SUITES[suite].items():
                yield f"- {check}: {meaning}"
        if self.reasons:
            yield "\n## Where PyTorch's own suite leaves cases out\n"
            for i, reason in enumerate(self.reasons, 1):
                yield f"{i}. {reason}"
