"""What a file is by its first bytes: how it is packed; where it holds no records, what it is and how to convert it."""

import codecs
import json
import re
import shlex

_PACKED = {
    "gzip": re.compile(rb"\x1f\x8b"),
    # The second is a skippable frame, with which pzstd begins.
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9]"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
_UNPACK = {"gzip": "gunzip -c", "zstd": "zstd -dc", "bzip2": "bunzip2 -c", "xz": "xz -dc"}
_ENDINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}

_NO_TEXT = {
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": ("a zip archive", "unzip -p"),
    rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff": ("text in UTF-32", "iconv -f UTF-32 -t UTF-8"),
    rb"\xff\xfe|\xfe\xff": ("text in UTF-16", "iconv -f UTF-16 -t UTF-8"),
    rb"[\s\{\[]\x00[^\x00]\x00": ("text in UTF-16", "iconv -f UTF-16LE -t UTF-8"),
    rb"\x00[\s\{\[]\x00[^\x00]": ("text in UTF-16", "iconv -f UTF-16BE -t UTF-8"),
    rb"[\s\{\[]\x00\x00\x00[^\x00]": ("text in UTF-32", "iconv -f UTF-32LE -t UTF-8"),
    rb"\x00\x00\x00[\s\{\[]\x00": ("text in UTF-32", "iconv -f UTF-32BE -t UTF-8"),
    rb"ORC": ("an ORC file", ""),
    rb"\x93NUMPY": ("a NumPy file", ""),
    rb"%PDF-": ("a PDF file", ""),
    rb"PAR1": ("a Parquet file", ""),
    rb"ARROW1\x00\x00": ("an Arrow file", ""),
    rb"Obj\x01": ("an Avro file", ""),
    rb"\x89HDF": ("an HDF5 file", ""),
    rb"SQLite format 3\x00": ("an SQLite database", ""),
    rb"\x80[\x02-\x05]": ("a Python pickle", ""),
    rb"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x -so"),
    rb"Rar!\x1a\x07": ("a RAR archive", "unrar p -inul"),
    rb"\x04\x22\x4d\x18": ("packed with LZ4", "lz4 -dc"),
    rb"\xff\x06\x00\x00sNaPpY": ("packed with Snappy", "snzip -dc"),
    rb"\x5d\x00\x00[\x00-\xff]{2}": ("packed with LZMA", "xz -dc --format=lzma"),
    rb"LZIP\x01": ("packed with lzip", "lzip -dc"),
    rb"\x89LZO\x00": ("packed with lzop", "lzop -dc"),
    rb"\x78[\x01\x5e\x9c\xda]": ("packed with zlib", "zlib-flate -uncompress"),
    rb"\x1f\x9d": ("packed with compress", "uncompress -c"),
}
"""First bytes that no text has → what the file is, and the command that makes text of it, where there is one."""

_SPREAD = re.compile(rb"(\xef\xbb\xbf)?\s*([\[{]([^\n]*[\[{])?[ \t]*\n\s*\S|\{[^\n]*\},[ \t]*\n\s*\{[^\n]*\},[ \t]*\n)")
"""Starts JSON over several lines, of which the last record may stand alone on one: a line that ends with a bracket that
opens, or two that end with a comma."""
_WRAPPED = re.compile(r'\{\s*"((?!dialog"|profile")[^"\\]+)"\s*:\s*\[\s*\{')
_BYTE_ORDER_MARK = "\ufeff"


def packing(head: bytes) -> str | None:
    """How a file is packed, by its first bytes: gzip, zstd, bzip2 or xz; ``None`` for none of them."""
    return next((kind for kind, magic in _PACKED.items() if magic.match(head)), None)


def named_packing(name: str) -> str | None:
    """How a file is packed by the ending of its name; ``None`` for not at all."""
    return next((kind for ending, kind in _ENDINGS.items() if name.lower().endswith(ending)), None)


def no_text(head: bytes, file: str, packed: str | None) -> str | None:
    """What a file is that holds no lines of text, and how to convert it; ``None`` for one that may hold some.

    ``head`` are its first bytes after unpacking; some 300 do.
    """
    if again := packing(head):
        return _said(f"packed twice, the second time with {again}", file, packed, _UNPACK[again])
    if _is_tar(head):
        return _said("a tar archive", file, packed, "tar -xO -f")
    if _SPREAD.match(head):
        return no_records(head, file, packed)
    for magic, (what, command) in _NO_TEXT.items():
        if re.match(magic, head):
            if command:
                return _said(what, file, packed, command)
            return f"it is {what}; write its rows as JSON lines, one object per line"
    return None


def _is_tar(head: bytes) -> bool:
    """Whether the header's checksum is right: old archives have no other mark."""
    field = head[148:156].strip(b"\0 ")
    if len(head) < 512 or not re.fullmatch(b"[0-7]{1,7}", field):
        return False
    return int(field, 8) == sum(head[:148]) + 8 * ord(" ") + sum(head[156:512])


def no_records(head: bytes, file: str, packed: str | None) -> str:
    """What a text file may be of which every line is rejected, and how to convert it.

    ``head`` are its first bytes after unpacking; the more, the surer.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return _in_another_encoding(head, file, packed)
    text = text.removeprefix(_BYTE_ORDER_MARK).lstrip()
    line = text.partition("\n")[0].rstrip()
    if re.match(r"\[\s*\{", text):
        return _said("a JSON array", file, packed, "jq -c '.[]'")
    if wrapped := _WRAPPED.match(text):
        command = f"jq -c {shlex.quote(f'.{json.dumps(wrapped[1], ensure_ascii=False)}[]')}"
        return _said(f"a JSON object whose `{wrapped[1]}` is an array", file, packed, command)
    if re.match(r"\{\s*'", text):
        return "it is Python's notation (single quotes); write every record with json.dumps, one per line"
    if text.startswith('"{'):
        return _said("JSON objects quoted as strings", file, packed, "jq -c fromjson")
    if text.startswith("{") and line.endswith("},"):
        return _said("JSON objects with commas between them", file, packed, "sed 's/,[[:space:]]*$//'")
    if text.startswith("{") and _is_not_one_object_per_line(text, line):
        return _said("JSON, but not one object per line (pretty-printed?)", file, packed, "jq -c .")
    if text.startswith("version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with git lfs pull"
    if text.startswith("<"):
        return "it is HTML or XML, perhaps the error page of a download; fetch the file again"
    if not text.startswith(("{", "[")) and re.search("[,\t;]", line):
        return "it looks like a table (CSV); write every row as one JSON object with `dialog` and `profile` on a line"
    return "every line must be one JSON object with `dialog` and `profile`; correct the file, or move it elsewhere"


def _is_not_one_object_per_line(text: str, line: str) -> bool:
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return line == "{"
    return end != len(line)


def _in_another_encoding(head: bytes, file: str, packed: str | None) -> str:
    try:
        codecs.getincrementaldecoder("gb18030")().decode(head)
    except UnicodeDecodeError:
        if b"\0" in head:
            return "it is not text, or packed in a way unknown here (Brotli?); unpack it, or move it elsewhere"
        return "it is not text in UTF-8; convert it with iconv, or move it elsewhere"
    return _said("not UTF-8, but perhaps GB18030 (GBK)", file, packed, "iconv -f GB18030 -t UTF-8")


def _said(what: str, file: str, packed: str | None, command: str) -> str:
    name = shlex.quote(file.rpartition("/")[2])
    if command.startswith(("unzip", "tar", "7z", "unrar")) or packed is None:  # they want a file, and tar unpacks it
        return f"it is {what}; convert it with: {command} {name} > records.jsonl"
    return f"it is {what}; convert it with: {_UNPACK[packed]} {name} | {command} > records.jsonl"
