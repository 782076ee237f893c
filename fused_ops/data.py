"""Names to contexts and targets: what the next character is, given the last few."""

import random
from pathlib import Path

import torch

DEFAULT_PATH = Path(__file__).with_name("names.txt")  # in the package, to be installed with it; see data/README.md
END = "."  # stands before a name's first character and after its last; index 0


class DataError(ValueError):
    """The data cannot be used; the message says why in one line."""


def read_names(path):
    """The names in a UTF-8 text file, one a line, in its order; blank lines are passed over.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, has a name with the character ".", or has too few names
            for each of the three splits to have one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the data file {path} is not UTF-8 text") from error
    names = [line.strip() for line in lines if line.strip()]
    if not all(split_names(names)):
        raise DataError(f"the data file {path} has {len(names)} names: too few to split into train, dev and test")
    for name in names:
        if END in name:
            raise DataError(f"the data file {path} has the name {name!r}: {END!r} is what ends a name")
    return names


def split_names(names):
    """Shuffle with the seed 42 and cut at 80% and 90%, as the lecture does: the train, dev and test names."""
    names = list(names)
    random.Random(42).shuffle(names)
    n1, n2 = int(0.8 * len(names)), int(0.9 * len(names))
    return names[:n1], names[n1:n2], names[n2:]


def vocabulary(names):
    """The characters a model of these names knows: `END`, then those of the names in sorted order."""
    return END + "".join(sorted(set("".join(names))))


def contexts(names, characters, block_size):
    """Every character of every name, and the end, with the `block_size` characters before it.

    Returns:
        X (rows, block_size) and Y (rows,), int64 indices into `characters`.

    Raises:
        DataError: a name has a character that is not in `characters`.
    """
    index = {character: i for i, character in enumerate(characters)}
    unknown = sorted(set("".join(names)) - set(characters))
    if unknown:
        raise DataError(f"the data has characters that the model doesn't know: {' '.join(map(repr, unknown))}")
    X, Y = [], []
    for name in names:
        context = [0] * block_size
        for character in name + END:
            Y.append(index[character])
            X.append(context)
            context = context[1:] + [index[character]]
    return torch.tensor(X).view(-1, block_size), torch.tensor(Y)
