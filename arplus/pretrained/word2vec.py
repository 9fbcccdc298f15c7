"""Character vectors of a data set's own text by word2vec (Mikolov et al. 2013), as the paper pretrains its embeddings.

gensim, an extra, does it, at the settings of the paper's code, which are gensim's own: CBOW, a window of 5, 5 negative
samples, 5 epochs, characters seen 5 times or more. The text is of the training split alone; the paper's had the test
set's too.
"""

import logging
from collections.abc import Iterator
from typing import Any

from arplus import storage
from arplus.config import VectorsConfig
from arplus.data.dataset import Dataset
from arplus.data.sampler import EpochSampler
from arplus.errors import UsageError

SEEN = 5
"""Least times that a character is seen."""


class Utterances:
    """What is said in the training split, as lists of characters, read from storage anew at each pass.

    Of every example the utterance that is answered and the response, as the model sees them; [UNK] is left out.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.characters = dataset.characters
        split = dataset.split("train")
        self.windows = EpochSampler(split=split, batch_size=1024, window_batches=64, seed=0, shuffled=False)

    def __iter__(self) -> Iterator[list[str]]:
        tokens, sep = self.characters.tokens, self.characters.special.sep
        for window in range(self.windows.windows):
            table = self.windows.read(0, window, ["context", "response"])
            for context, response in zip(*(column.to_pylist() for column in table.columns), strict=True):
                context.pop()  # the last utterance's [SEP]
                last = context[::-1].index(sep) if sep in context else len(context)
                for ids in (context[len(context) - last :], response):
                    yield [tokens[i] for i in ids if i < len(tokens)]


def make_vectors(config: VectorsConfig) -> str:
    """Trains vectors and writes them to ``--output``; what was written, in words.

    Raises :class:`UsageError` where gensim is not installed or the text is too short, and for data or output that
    cannot be used.
    """
    dataset = Dataset.open(config.data)
    storage.check_writable(config.output)
    vectors = _train(config, Utterances(dataset))
    rows = [(token, vectors[token]) for token in dataset.characters.tokens if token in vectors]
    lines = [f"{token} {' '.join(f'{x:.7g}' for x in vector)}\n" for token, vector in rows]
    storage.write_bytes(config.output, f"{len(rows)} {config.size}\n{''.join(lines)}".encode())
    return (
        f"{len(rows):,} of {len(dataset.characters.tokens):,} characters, {config.size} numbers each: {config.output}"
    )


def _train(config: VectorsConfig, text: Utterances) -> Any:
    try:
        from gensim.models import Word2Vec
    except ImportError:
        raise UsageError("jobs/vectors.py needs gensim, the extra 'vectors': pip install -e '.[vectors]'") from None
    logging.getLogger("gensim.utils").setLevel(logging.WARNING)  # it prints dictionaries; how far it is, others say
    try:
        return Word2Vec(
            text,
            vector_size=config.size,
            window=config.window,
            negative=config.negative,
            epochs=config.epochs,
            sg=int(config.skip_gram),
            min_count=SEEN,
            seed=config.seed,
            workers=config.workers,
        ).wv
    except RuntimeError as error:  # no word left
        raise UsageError(f"--data {config.data}: has too little text in its training split ({error})") from None
