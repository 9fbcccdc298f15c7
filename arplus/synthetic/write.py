"""Writes generated records with planted duplicates and broken lines: every line as a function of the settings alone.

Lines are made in blocks of a fixed size, each from a random stream of its own; memory does not grow with their number.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import orjson
import zstandard
from isal import igzip
from pyarrow import fs

from arplus import storage
from arplus.config import SynthesizeConfig
from arplus.errors import UsageError
from arplus.synthetic.dialogues import raw_profiles, raw_records
from arplus.synthetic.phrases import language

BLOCK = 16_384
"""Lines made together. Part of the format: another size gives other records for the same seed."""
POOL = 16_384
"""Earlier records kept for duplicates; sets how far apart an original and its repetition may lie."""


@dataclass
class Written:
    """What was written, in lines."""

    records: int = 0
    """Lines in all, without those of chatterbot-corpus."""
    originals: int = 0
    """Records that are distinct in every sense."""
    exact_duplicates: int = 0
    """Lines equal to an earlier one."""
    space_duplicates: int = 0
    """Lines that differ from an earlier one in white space only."""
    broken: int = 0
    """Lines that hold no valid record."""
    chatterbot: int = 0
    """Records of chatterbot-corpus, after the others."""


def generate(config: SynthesizeConfig, counts: Written | None = None) -> Iterator[bytes]:
    """The lines of :class:`SynthesizeConfig`, without line ends, in blocks' order; ``counts`` is filled on the way.

    Raises :class:`UsageError` where jieba (or chatterbot-corpus, if asked for) is not installed.
    """
    counts = Written() if counts is None else counts
    words = language()
    # Kinds of line: original, exact duplicate, duplicate but for white space, broken.
    left = np.array([0, config.duplicates // 2, config.duplicates - config.duplicates // 2, config.broken])
    left[0] = config.records - left.sum()
    pool: list[tuple[str, int]] = []
    latest = _SPARE
    for block in range(-(-config.records // BLOCK)):
        rng = np.random.default_rng([config.seed, block])
        size = min(BLOCK, int(left.sum()))
        # The very first line is an original, so that a duplicate always finds something to repeat.
        first = 1 if block == 0 and left[0] else 0
        left[0] -= first
        drawn = rng.multivariate_hypergeometric(left, size - first)
        left -= drawn
        kinds = np.repeat(np.arange(4), drawn)
        rng.shuffle(kinds)
        fresh = int(drawn[0]) + first
        numbers = counts.originals + np.arange(fresh)
        originals = iter(raw_records(words, rng, numbers, seed=config.seed, persona_answers=config.persona_answers))
        keep = iter((rng.random(fresh) < _pool_share(config)).tolist())
        for kind in [0] * first + kinds.tolist():
            if kind == 0:
                line = latest = next(originals)
                counts.originals += 1
                if next(keep) or not pool:
                    if len(pool) < POOL:
                        pool.append((line, 0))
                    else:
                        pool[int(rng.integers(POOL))] = (line, 0)
            elif kind == 1:
                line = pool[int(rng.integers(len(pool)))][0]
                counts.exact_duplicates += 1
            elif kind == 2:
                at = int(rng.integers(len(pool)))
                original, used = pool[at]
                # One space more each time: repetitions of one record differ from each other too.
                pool[at] = (original, used + 1)
                line = _with_spaces(original, used + 1, rng)
                counts.space_duplicates += 1
            else:
                counts.broken += 1
                counts.records += 1
                yield _broken(latest, rng)
                continue
            counts.records += 1
            yield line.encode()
    if config.chatterbot:
        for record in chatterbot_records(config.seed):
            counts.chatterbot += 1
            yield record


def _pool_share(config: SynthesizeConfig) -> float:
    """Share of the originals that enter the pool: enough to refresh it as fast as duplicates are drawn."""
    return min(1.0, 2 * config.duplicates / config.records) if config.records > POOL else 1.0


# --------------------------------------------------------------------------------- duplicates and broken lines

_SPARE = (
    '{"dialog": [["今天 吃 什么"], ["吃 火锅 吧 ！"]], '
    '"profile": [{"tag": ["美食"], "loc": "四川 成都", "gender": "female"}, {"tag": [""], "loc": "", "gender": ""}], '
    '"uid": [0, 1]}'
)
"""What broken lines are made from where there is no record yet."""


def _with_spaces(line: str, count: int, rng: np.random.Generator) -> str:
    """The line with ``count`` more spaces in one place between two words of an utterance."""
    start, end = line.index('[["') + 3, line.index('"]], "profile"')
    # A space that follows a comma belongs to the JSON, not to an utterance.
    spaces = [i for i in range(start, end) if line[i] == " " and line[i - 1] != ","]
    at = spaces[int(rng.integers(len(spaces)))]
    return line[:at] + " " * count + line[at:]


def _broken(line: str, rng: np.random.Generator) -> bytes:
    """A line that no reader may accept, made from a valid one in a random way."""
    data = line.encode()
    start, profile = line.index('[["') + 3, line.index('"profile"')
    uid = line.index('"uid"')
    head, middle, tail = line[:profile], line[profile:uid], line[uid:]
    ways = (
        lambda: data[: int(rng.integers(1, len(data)))],  # truncated
        lambda: line[:start].encode() + b"\xff\xfe\xe4" + line[start:].encode(),  # not UTF-8
        lambda: line[:start].encode() + b"\x00" + line[start:].encode(),  # NUL
        lambda: b"{}",
        lambda: b"[]",
        lambda: b"null",
        lambda: b"<html><body>502 Bad Gateway</body></html>",
        lambda: b'{"dialog": 7, ' + line[profile:].encode(),  # wrong types
        lambda: b'{"dialog": [[1], [2]], ' + line[profile:].encode(),
        lambda: b'{"dialog": [], ' + line[profile:].encode(),
        lambda: (head + tail).encode(),  # no profile
        lambda: (head + '"profile": "none", ' + tail).encode(),
        lambda: (head + middle + tail.replace("[0", "[9", 1)).encode(),  # nobody's id
        lambda: (head + middle + tail.replace("[0", "[-1", 1)).encode(),
        lambda: (head + middle + '"uid": [0]}').encode(),  # too few
        lambda: (head + middle + '"uid": "0 1"}').encode(),
    )
    return ways[int(rng.integers(len(ways)))]()


# ------------------------------------------------------------------------------------------- chatterbot-corpus


def _corpus() -> Path:
    """The folder of chatterbot-corpus' Chinese part. Raises :class:`UsageError` where it is not installed."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("--chatterbot: chatterbot-corpus is not installed: pip install -e '.[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "chinese"


def chatterbot_records(seed: int = 0) -> Iterator[bytes]:
    """The conversations of chatterbot-corpus' Chinese part (BSD) as raw records with random personas.

    Utterances are not split into words. Conversations of one turn are left out. Raises :class:`UsageError` where the
    corpus is not installed.
    """
    folder = _corpus()
    import yaml  # comes with the corpus

    rng = np.random.default_rng([seed, 1 << 32])
    for file in sorted(folder.glob("*.yml")):
        content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        for conversation in content["conversations"]:
            turns = [" ".join(str(turn).split()) for turn in conversation]
            if len(turns) > 1:
                profiles = [orjson.loads(profile) for profile in raw_profiles(language(), rng, 2)[1]]
                uid = [i % 2 for i in range(len(turns))]
                yield orjson.dumps({"dialog": [[turn] for turn in turns], "profile": profiles, "uid": uid})


# ----------------------------------------------------------------------------------------------------- writing

_FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def synthesize(config: SynthesizeConfig) -> Written:
    """Writes the lines of :func:`generate` to ``config.output``: one file where its name says so, else a folder.

    A folder is filled with ``part-00000.jsonl.gz`` …, of ``config.part_records`` lines each. Locally nothing appears
    under the output's name before all is written. On S3 parts appear one by one, and are removed should it fail.
    Raises :class:`UsageError` where the output cannot be written, is a file already, or is a folder that holds files;
    and :class:`ResourceError` where it lacks space, or S3 does not answer.
    """
    if config.chatterbot:
        _corpus()  # now, and not when all else is written
    counts = Written()
    lines = generate(config, counts)
    filesystem, path = storage.resolve_lasting(config.output)
    single = path.endswith(_FILE_ENDINGS)
    if not single and path.endswith((".gz", ".zst", ".json")):
        raise UsageError(f"{config.output}: a single file must end in {', '.join(_FILE_ENDINGS)}; else name a folder")
    with storage.translate_errors(config.output):
        info = filesystem.get_file_info(path)
        if single and info.type == fs.FileType.Directory:
            raise UsageError(f"{config.output}: is a folder")
        if single and info.type == fs.FileType.File:
            raise UsageError(f"{config.output}: the file exists; delete it or name another --output")
        if not single and info.type == fs.FileType.File:
            raise UsageError(f"{config.output}: is a file; name a folder, or a file that ends in .jsonl.gz")
        if info.type == fs.FileType.Directory and filesystem.get_file_info(fs.FileSelector(path)):
            raise UsageError(f"{config.output}: the folder is not empty; delete it or name another --output")
        with _whole(filesystem, path) as target:
            if not single and isinstance(filesystem, fs.LocalFileSystem):
                filesystem.create_dir(target)
            if single:
                _write(filesystem, target, lines, path)
            else:
                _write_parts(filesystem, target, lines, config)
    return counts


def _write_parts(filesystem: fs.FileSystem, folder: str, lines: Iterator[bytes], config: SynthesizeConfig) -> None:
    part = 0
    while (line := next(lines, None)) is not None:
        path = f"{folder}/part-{part:05d}.jsonl.gz"
        _write(filesystem, path, chain([line], islice(lines, config.part_records - 1)), path)
        part += 1


def _write(filesystem: fs.FileSystem, path: str, lines: Iterator[bytes], name: str) -> None:
    """Writes lines to ``path``, compressed as ``name`` ends."""
    with (
        filesystem.open_output_stream(path, compression=None) as stream,
        closing(_compressed(stream, name)) as file,
    ):
        while several := list(islice(lines, 4096)):
            file.write(b"\n".join(several) + b"\n")


def _compressed(stream: Any, name: str) -> Any:
    """A file that writes to ``stream``, compressed as ``name`` ends."""
    if name.endswith(".gz"):
        # No name and no time in the header: the same lines give the same bytes.
        return igzip.IGzipFile(filename="", mode="wb", compresslevel=2, fileobj=stream, mtime=0)
    if name.endswith(".zst"):
        return zstandard.ZstdCompressor(level=3).stream_writer(stream, closefd=False)
    return stream


@contextmanager
def _whole(filesystem: fs.FileSystem, path: str) -> Iterator[str]:
    """The path to write to in place of ``path``; what it holds goes to ``path`` at the end, or away on failure."""
    local = isinstance(filesystem, fs.LocalFileSystem)
    target = str(Path(path).with_name(f".{Path(path).name}.{uuid4().hex[:8]}.tmp")) if local else path
    try:
        if local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield target
        if local:
            Path(target).replace(path)
    except BaseException:
        found = filesystem.get_file_info(target).type
        if found == fs.FileType.Directory:
            filesystem.delete_dir(target)
        elif found == fs.FileType.File:
            filesystem.delete_file(target)
        raise
