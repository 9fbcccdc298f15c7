"""A pretrained model as transformers reads it: a folder, here or on S3, or a name on the model hub.

A folder is read without the network, code that comes with a model is never run, and weights are safetensors, or a
``.bin`` that torch reads as tensors alone.
"""

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from arplus import storage
from arplus.config import special_ids
from arplus.errors import UsageError
from arplus.process import in_thread, own_folder
from arplus.text import Vocabulary

LEAST_COVERAGE = 0.9
"""Of the text's characters, which a model's vocabulary must know, or a file of vectors."""
HUB_SECONDS = 8.0
"""Longest wait for the hub's first answer: with what is imported before it, a job ends within 15 s."""
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""The first kind that a folder has is taken."""
_FILES = ("config.json", "vocab.txt", "tokenizer*", "spiece.model", "*.index.json", *_WEIGHTS)
_SPECIALS = {
    "bos": ("[CLS]", "<cls>"),
    "eos": ("[SEP]", "<sep>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}
"""Our special tokens that have a place in BERT's or XLNet's vocabulary; the others are strangers there."""


class Pretrained(NamedTuple):
    """A model and what its ids mean."""

    network: Any
    """The bare network (:class:`transformers.PreTrainedModel`), in evaluation mode, in fp32, on the CPU."""
    vocabulary: Mapping[str, int]
    digest: str
    """SHA-256 of its weights."""


def absolute(path: str) -> str:
    """The path as every process understands it; a hub's name stays."""
    return storage.absolute(path) if _is_folder(path) else path


def digest(path: str, flag: str) -> str:
    """SHA-256 of the model's weights. ``flag`` is the setting that named it, for errors: see :func:`load`."""
    return _digest(_folder(path, flag), path, flag)


def load(path: str, flag: str, expected: str | None = None) -> Pretrained:
    """Reads a model, of which ``expected`` is the digest.

    Raises :class:`UsageError` where transformers is not installed, where ``path`` is not such a model, where the hub
    does not answer, and where the weights are others than expected.
    """
    folder, found = _expected(path, flag, expected)
    auto = _transformers(flag).AutoModel
    try:
        with torch.random.fork_rng(devices=[]):  # what the file lacks, such as a pooler, is drawn
            network, about = auto.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        vocabulary = _vocabulary(folder, flag)
    except Exception as error:  # transformers and safetensors raise whatever comes up
        raise UsageError(f"--{flag} {path}: cannot be read as a model ({_first_line(error)})") from None
    if lacking := sorted(name for name in about["missing_keys"] if not name.startswith("pooler.")):
        raise UsageError(f"--{flag} {path}: its weights lack {len(lacking)} of its tensors, {lacking[0]} for one")
    return Pretrained(network.eval(), vocabulary, found)


def width(path: str, flag: str, expected: str | None = None) -> tuple[int, str]:
    """Features of a model's hidden states, and the digest of its weights, without making it; raises as load."""
    folder, found = _expected(path, flag, expected)
    auto = _transformers(flag).AutoConfig
    try:
        size: int = auto.from_pretrained(folder, local_files_only=True).hidden_size
    except Exception as error:  # transformers raises whatever comes up
        raise UsageError(f"--{flag} {path}: cannot be read as a model ({_first_line(error)})") from None
    return size, found


def their_ids(characters: Vocabulary, theirs: Mapping[str, int]) -> list[int | None]:
    """For each id of ours theirs: of the character itself, or of its lower case; None for what they do not know."""
    found = [theirs.get(token, theirs.get(token.lower())) for token in characters.tokens]
    for name in special_ids(characters.size)._fields:
        found.append(next((theirs[token] for token in _SPECIALS.get(name, ()) if token in theirs), None))
    return found


def coverage(characters: Vocabulary, ids: Sequence[int | None]) -> float:
    """The share of the text's characters that have an id; of the vocabulary's where nobody counted the text."""
    counts = characters.counts if any(characters.counts) else [1] * len(characters.tokens)
    known = sum(count for count, i in zip(counts, ids, strict=False) if i is not None)
    return known / max(sum(counts), 1)


def _vocabulary(folder: Path, flag: str) -> dict[str, int]:
    """Tokens and their ids. A ``vocab.txt`` comes first: some ALBERTs have BERT's, which AutoTokenizer does not see."""
    file = folder / "vocab.txt"
    if file.exists():
        return {token: i for i, token in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"))}
    found: dict[str, int] = _transformers(flag).AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    return found


def _expected(path: str, flag: str, expected: str | None) -> tuple[Path, str]:
    """A model's files, and the digest of its weights, which is the ``expected`` one if there is one."""
    folder = _folder(path, flag)
    found = _digest(folder, path, flag)
    if expected not in (None, found):
        raise UsageError(
            f"--{flag} {path}: its weights are not those of before (SHA-256 {found[:12]}…, not {expected[:12]}…): "
            "bring them back, or take another --run-name"
        )
    return folder, found


def _digest(folder: Path, path: str, flag: str) -> str:
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in _WEIGHTS)), None)
    if files is None or not (folder / "config.json").is_file():
        raise UsageError(
            f"--{flag} {path}: is not a model's folder: it needs config.json, vocab.txt and model.safetensors or "
            "pytorch_model.bin"
        )
    sha256 = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            while part := opened.read(1 << 24):
                sha256.update(part)
    return sha256.hexdigest()


def _folder(path: str, flag: str) -> Path:
    """The model as files of this machine."""
    if not _is_folder(path):
        return _from_hub(path, flag)
    return Path(storage.resolve(path)[1]) if storage.is_local(path) else _copied(path)


def _copied(path: str) -> Path:
    """A folder on S3 as one of this machine: copied once for all its processes, and again when it has changed."""
    uris = [uri for uri in storage.list_files(path, missing_ok=True) if any(map(PurePath(uri).match, _FILES))]
    state = "\n".join(f"{uri} {storage.version(uri)}" for uri in uris)
    copy = own_folder() / "pretrained" / hashlib.sha256(state.encode()).hexdigest()
    copy.parent.mkdir(exist_ok=True)
    with FileLock(f"{copy}.lock"):
        if uris and not copy.exists():
            half = Path(f"{copy}.half")  # which a process that was killed may have left
            for uri in uris:
                storage.write_bytes(f"{half}{uri.removeprefix(path.rstrip('/'))}", storage.read_bytes(uri))
            half.rename(copy)
    return copy


def _is_folder(path: str) -> bool:
    """Whether it is not a hub's name, such as ``bert-base-chinese`` or ``hfl/chinese-electra-small``."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path) is not None
    return not is_name or Path(path).exists()


def _from_hub(name: str, flag: str) -> Path:
    _transformers(flag)
    import huggingface_hub

    def fetch(**how: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES), **how))

    with contextlib.suppress(Exception):  # it is not in the cache, or not whole
        folder = fetch(local_files_only=True)
        _digest(folder, name, flag)
        return folder
    try:
        hub = huggingface_hub.HfApi()
        # A name server may be waited for longer than any limit says.
        revision = in_thread(lambda: hub.model_info(name, timeout=HUB_SECONDS).sha, HUB_SECONDS)
        return fetch(revision=revision)
    except Exception as error:  # of the hub's own, of httpx, of the system
        raise UsageError(
            f"--{flag} {name}: is not a folder here, and the model hub does not give it ({_first_line(error)}); name a "
            "folder with config.json, vocab.txt and weights"
        ) from None


def _transformers(flag: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise UsageError(
            f"--{flag}: needs transformers, the extra 'pretrained': pip install -e '.[pretrained]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
