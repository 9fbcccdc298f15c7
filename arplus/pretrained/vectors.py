"""Character vectors as the start of the character table (``--init.character-vectors``).

A file is in word2vec's text form, as :mod:`arplus.pretrained.word2vec`, gensim and the paper's code write it: a line
``V E``, then V lines of a token and E numbers. Rows of characters that it lacks start as ever.

How large trained vectors are depends on the corpus (0.2 to 1 by component), and a table entry is multiplied by √E: as
they are they would drown positions and personas. So one factor gives them the RMS of a table's start, √(2/(V + E)).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arplus import storage
from arplus.errors import UsageError
from arplus.model.network import PersonaTransformer
from arplus.pretrained import models
from arplus.text import Vocabulary

FLAG = "init.character-vectors"


class CharacterVectors(NamedTuple):
    """Vectors of characters of a vocabulary."""

    ids_N: NDArray[np.int64]
    vectors_NE: NDArray[np.float32]
    coverage: float
    """Share of the text's characters that they are of."""


def read(uri: str, characters: Vocabulary) -> CharacterVectors:
    """The vectors of a file for ``characters``. Raises :class:`UsageError` naming the flag, the file and the line."""
    what = f"--{FLAG} {uri}"
    head, *lines = storage.read_bytes(uri).removesuffix(b"\n").split(b"\n")  # a token may be another end of line
    if not (len(sizes := head.split()) == 2 and all(size.isdigit() for size in sizes)):
        raise UsageError(f"{what}: line 1: must be two numbers, of vectors and of their components (word2vec's text)")
    n, width = map(int, sizes)
    if len(lines) != n:
        raise UsageError(f"{what}: line 1: says that {n} vectors follow, and {len(lines)} do; is the file whole?")
    found: dict[str, NDArray[np.float32]] = {}
    for number, line in enumerate(lines, 2):
        try:
            # From the right: a token may be a blank, a digit or a quote.
            token, *numbers = line.decode().rstrip("\r ").rsplit(" ", width)
            vector = np.array(numbers, np.float32)
        except ValueError as error:
            raise UsageError(f"{what}: line {number}: {error}") from None
        if not token or len(vector) != width or not np.isfinite(vector).all():
            raise UsageError(f"{what}: line {number}: must hold a token and {width} finite numbers")
        if token in found:
            raise UsageError(f"{what}: line {number}: {token!r} is there twice")
        found[token] = vector
    ids = [i for i, token in enumerate(characters.tokens) if token in found]
    coverage = models.coverage(characters, [i if token in found else None for i, token in enumerate(characters.tokens)])
    if coverage < models.LEAST_COVERAGE:
        raise UsageError(
            f"{what}: has vectors for {coverage:.0%} of the text's characters, less than {models.LEAST_COVERAGE:.0%}; "
            "make some of this data with jobs/vectors.py"
        )
    return CharacterVectors(np.array(ids), np.stack([found[characters.tokens[i]] for i in ids]), coverage)


@torch.no_grad()
def initialise(model: PersonaTransformer, characters: Vocabulary, uri: str) -> str:
    """Sets the rows of the character table to a file's vectors, times one factor; what was set, in words.

    Raises :class:`UsageError` as :func:`read` does, and where the vectors have another width than the table.
    """
    found, table_VE = read(uri, characters), model.characters.weight
    rms = float(np.sqrt(np.square(found.vectors_NE, dtype=np.float64).mean()))
    if found.vectors_NE.shape[1] != table_VE.shape[1] or not rms:
        raise UsageError(
            f"--{FLAG} {uri}: has vectors of {found.vectors_NE.shape[1]} components and RMS {rms:.3g}, and the "
            f"characters need {table_VE.shape[1]}; make them with jobs/vectors.py --size {table_VE.shape[1]}"
        )
    factor = math.sqrt(2 / sum(table_VE.shape)) / rms
    ids, rows = torch.from_numpy(found.ids_N), torch.from_numpy(found.vectors_NE * np.float32(factor))
    table_VE.index_copy_(0, ids.to(table_VE.device), rows.to(table_VE.device))
    tied = "; so are the output head's, which is the same table" if model.config.tied_head else ""
    return (
        f"--{FLAG}: {len(ids):,} of {len(characters.tokens):,} characters, {found.coverage:.1%} of the text, start "
        f"from {uri}, times {factor:.3g}{tied}"
    )
