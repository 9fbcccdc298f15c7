"""Which files are read, what is said of the others, and what a file is that holds no record."""

import gzip
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from arplus import cli, storage
from arplus.config import PrepareConfig
from arplus.data.manifest import LeftOut
from arplus.data.sessions import parse_block
from arplus.errors import UsageError
from arplus.prepare.jsonl import read_blocks
from arplus.prepare.sources import Source, add_up, find_files, find_sources, summarise
from arplus.prepare.tasks import Shard

CASES = Path(__file__).parent.parent / "cases"
ARRAY = (CASES / "array.json").read_bytes()
RECORDS = json.loads(ARRAY)
LINES = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)
MANIFEST = json.dumps({"format": 1, "fingerprint": "ab", "splits": {}})
CUT = storage.as_json(json.loads(MANIFEST))[:-5]
LEASE = json.dumps({"token": "0a1b2c3d", "holder": "process 1 on a", "expires": 0.0})


def make(folder: Path, names: dict[str, str | bytes]) -> None:
    for name, content in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder: Path) -> tuple[list[str], dict[str, tuple[int, str]]]:
    found = find_files(str(folder))
    names = [file.removeprefix(f"{folder}/") for file in found.records]
    return names, {item.name: (item.files, item.why) for item in found.left_out}


READ = ["A.JSONL", "a.jsonl.gz", "b.NDJSON", "c.Json.ZST", "d.jsonl.bz2", "e.ndjson.xz", "part-00000", "part-00001.gz"]
READ += ["part-00002-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f-c000", "part-r-00003.bz2", "sub/f.json", "名.jsonl"]
OTHERS = ["README.txt", "a.txt.gz", "d.zst", "notes.md", "part-00004.parquet", "x.csv", "sub/part-0.lock", "jsonl"]


def test_files_are_read_by_their_names_and_the_others_are_listed(tmp_path: Path) -> None:
    hidden = [".hidden.jsonl", "_SUCCESS", "_logs/a.jsonl", "_logs/b.jsonl", "sub/.git/deep/c.jsonl"]
    make(tmp_path, dict.fromkeys([*READ, *OTHERS, *hidden], ""))
    names, left_out = read(tmp_path)
    assert names == sorted(READ)
    assert left_out == {
        **dict.fromkeys(OTHERS, (1, "not named as records are")),
        **dict.fromkeys([".hidden.jsonl", "_SUCCESS", "sub/.git/"], (1, "hidden")),
        "_logs/": (2, "hidden"),
    }
    assert find_files(str(tmp_path / "README.txt")).records == [str(tmp_path / "README.txt")]


@pytest.mark.parametrize(
    ("mark", "content"),
    [("manifest.json", MANIFEST), ("manifest.json", CUT), ("_lease.json", LEASE), ("_lease.json", "")],
)
def test_a_prepared_data_set_is_counted_as_one(tmp_path: Path, mark: str, content: str) -> None:
    make(tmp_path, {"a.jsonl": "", "x/d.jsonl": "", f"x/out/{mark}": content, "x/out/rejects/e.jsonl.gz": ""})
    make(tmp_path, {"x/outer/f.json": ""})
    names, left_out = read(tmp_path)
    assert names == ["a.jsonl", "x/d.jsonl", "x/outer/f.json"]
    assert left_out == {"x/out/": (2, "a prepared data set")}
    with pytest.raises(UsageError, match="out: is a prepared data set, or an unfinished one"):
        find_files(str(tmp_path / "x/out"))


@pytest.mark.parametrize(
    "content",
    ['{"entries": [{"url": "s3://b/2024/a.jsonl"}]}', "[]", "7", "", "{", '{"format": 1}', b"\xff\xfe", "[" * 5000],
)
def test_a_manifest_of_another_program_is_no_mark_and_no_records(tmp_path: Path, content: str | bytes) -> None:
    make(tmp_path, {"2024/a.jsonl": "", "2024/manifest.json": content, "manifest.json": content, "b/b.jsonl": ""})
    make(tmp_path, {"b/_lease.json": '{"car": 7}', "b/Manifest.JSON": content})
    names, left_out = read(tmp_path)
    assert names == ["2024/a.jsonl", "b/b.jsonl"]
    manifests = ["2024/manifest.json", "manifest.json", "b/Manifest.JSON"]
    expected = dict.fromkeys(manifests, (1, "another program's manifest"))
    assert left_out == {**expected, "b/_lease.json": (1, "hidden")}


def test_a_name_that_is_not_utf8_does_not_block_its_folder(tmp_path: Path) -> None:
    make(tmp_path, {"ok.jsonl": ""})
    for name in (b"\xb6\xd4\xbb\xb0.jsonl", b"\xb6/a.jsonl", b"\xb6/manifest.json"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
    names, left_out = read(tmp_path)
    assert names == ["ok.jsonl"]
    assert set(left_out) == {r"\xb6Ի\xb0.jsonl", r"\xb6/a.jsonl", r"\xb6/manifest.json"}
    assert set(left_out.values()) == {(1, "the name is not UTF-8: rename it")}
    with pytest.raises(UsageError, match=r"\\xb6.*the name is not UTF-8"):
        find_files(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xb6")))


def test_a_command_line_that_is_not_utf8_is_refused() -> None:
    for arguments in (["--input", "/a/\udcb6.jsonl"], ["--input=\udcb6"]):
        with pytest.raises(UsageError, match=r".*\\xb6.* is not UTF-8"):
            cli.parse(PrepareConfig(), [*arguments, "--output", "b"], prog="prepare", description="")
    assert (
        cli.parse(PrepareConfig(), ["--input", "对话", "--output", "b"], prog="prepare", description="").input == "对话"
    )


def test_links_are_followed_without_end_and_one_to_nowhere_is_no_silent_loss(tmp_path: Path) -> None:
    make(tmp_path, {"in/a.jsonl": "", "elsewhere/b.jsonl": ""})
    (tmp_path / "in/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert read(tmp_path / "in")[0] == ["a.jsonl", "more/b.jsonl"]
    (tmp_path / "in/c.jsonl").symlink_to(tmp_path / "gone")
    (lost,) = (file for file in find_files(str(tmp_path / "in")).records if file.endswith("c.jsonl"))
    with pytest.raises(UsageError, match=r"c\.jsonl: no such file"):
        storage.size(lost)


def test_names_of_left_out_files_are_bounded_and_the_least_expected_come_first(tmp_path: Path) -> None:
    make(tmp_path, {f".git/{i}": "" for i in range(30)} | {f".h{i:02}": "" for i in range(30)} | {"z.txt": ""})
    make(tmp_path, {"a.jsonl": ""})
    summary = summarise(find_files(str(tmp_path)).left_out)
    assert summary.files == 61
    assert len(summary.names) == 20
    assert summary.names[0] == LeftOut("z.txt", 1, "not named as records are")


def test_no_record_file_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    make(tmp_path, {"in/a.txt": ""})
    with pytest.raises(UsageError, match=r"in: no record file in this folder; expected \*.jsonl.*it holds a.txt"):
        find_sources(PrepareConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out")))
    with pytest.raises(UsageError, match="no such file"):
        find_files(str(tmp_path / "absent"))


def check(files: dict[str, bytes], tmp_path: Path, **settings: Any) -> dict[str, int]:
    """What the reading and parsing of these files comes to, without Ray."""
    make(tmp_path, files)  # type: ignore[arg-type]
    uris = [str(tmp_path / name) for name in files]
    config = PrepareConfig(input=str(tmp_path), output=str(tmp_path / "out"), **settings)
    shards = []
    for i, uri in enumerate(uris):
        for block in read_blocks(uri):
            parsed = parse_block(block.lines, file=i, first_line=0, duplicate_key="dialogue", left_out=block.left_out)
            rejected: dict[str, int] = {}
            for reject in parsed.rejects:
                rejected[reject.reason] = rejected.get(reject.reason, 0) + 1
            shards.append(Shard(i, 0, 0, "", None, False, dict(parsed.counts), rejected))
    return dict(add_up(config, Source("", str(tmp_path), 0, uris, []), shards)[0])


@pytest.mark.parametrize("file", ["cr_only.jsonl", "pzstd.jsonl.zst"])
def test_records_that_were_lost_are_read(tmp_path: Path, file: str) -> None:
    assert check({file: (CASES / file).read_bytes()}, tmp_path)["sessions"] == 20


def test_a_first_line_that_is_broken_is_a_reject_like_any_other(tmp_path: Path) -> None:
    for start in (b'{"dialog": [["a"],\n', b'{"dialog": [["a"]]},\n', b"\n\n[]\n", b'[{"dialog": 1}]\n'):
        counts = check({"a.jsonl": start + LINES}, tmp_path, max_reject_share=1)
        assert (counts["records"], counts["sessions"]) == (21, 20)


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert check({"joined.jsonl": LINES + mark + mark + LINES}, tmp_path)["sessions"] == 40


PRETTY = "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()


def old_tar(name: str, data: bytes) -> bytes:
    """An archive of the form of 1979, which no magic bytes mark."""
    fields = [b"%07o" % n for n in (0o644, 0, 0)] + [b"%011o" % len(data), b"%011o" % 0]
    header = name.encode().ljust(100, b"\0") + b"".join(field + b"\0" for field in fields)
    total = sum(header) + 8 * ord(" ")
    header = (header + b"%06o\0 " % total).ljust(512, b"\0")
    return header + data + bytes(-len(data) % 512) + bytes(1024)


OLD_TAR = old_tar("a.jsonl", LINES)
UTF16, GBK = LINES.decode().encode("utf-16"), LINES.decode().encode("gbk")
WHOLE = {
    "array.json": (ARRAY, "jq -c '.[]' array.json > records.jsonl"),
    "array.json.gz": (gzip.compress(ARRAY), "gunzip -c array.json.gz | jq -c '.[]' > records.jsonl"),
    "spaced.json": (json.dumps(RECORDS, indent=1).encode(), "jq -c '.[]' spaced.json > records.jsonl"),
    "wrapped.json": (json.dumps({"data": RECORDS}).encode(), """jq -c '."data"[]' wrapped.json > records.jsonl"""),
    "pretty.json": (PRETTY, "jq -c . pretty.json > records.jsonl"),
    "joined.json": (LINES.replace(b"\n", b" "), "jq -c . joined.json > records.jsonl"),
    "lines.json": (b"[\n" + LINES.replace(b"\n", b",\n")[:-2] + b"\n]\n", "jq -c '.[]' lines.json > records.jsonl"),
    "inner.json": (
        b'{"data": [\n' + LINES.replace(b"\n", b",\n")[:-2] + b"\n]}\n",
        """jq -c '."data"[]' inner.json > records.jsonl""",
    ),
    "commas.jsonl": (
        LINES.replace(b"\n", b",\n")[:-2],
        "sed 's/,[[:space:]]*$//' commas.jsonl > records.jsonl",
    ),
    "quoted.jsonl": (
        b"".join(json.dumps(line.decode()).encode() + b"\n" for line in LINES.splitlines()),
        "jq -c fromjson quoted.jsonl > records.jsonl",
    ),
    "old.tar": (OLD_TAR, "tar -xO -f old.tar > records.jsonl"),
    "a.lzma": (lzma.compress(LINES, lzma.FORMAT_ALONE), "xz -dc --format=lzma a.lzma > records.jsonl"),
    "le32.jsonl": (LINES.decode().encode("utf-32-le"), "iconv -f UTF-32LE -t UTF-8 le32.jsonl > records.jsonl"),
    "be32.jsonl": (LINES.decode().encode("utf-32-be"), "iconv -f UTF-32BE -t UTF-8 be32.jsonl > records.jsonl"),
    "blank16.jsonl": (
        ("\n  " + LINES.decode()).encode("utf-16-le"),
        "iconv -f UTF-16LE -t UTF-8 blank16.jsonl > records.jsonl",
    ),
    "gbk.jsonl": (GBK, "iconv -f GB18030 -t UTF-8 gbk.jsonl > records.jsonl"),
    "twice.gz": (gzip.compress(gzip.compress(LINES)), "gunzip -c twice.gz | gunzip -c > records.jsonl"),
    "twice.xz": (lzma.compress(gzip.compress(LINES)), "xz -dc twice.xz | gunzip -c > records.jsonl"),
    "bom16.jsonl": (UTF16, "iconv -f UTF-16 -t UTF-8 bom16.jsonl > records.jsonl"),
    "le16.jsonl": (LINES.decode().encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 le16.jsonl > records.jsonl"),
    "be16.jsonl": (LINES.decode().encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8 be16.jsonl > records.jsonl"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_without_a_record_is_an_error_whose_command_mends_it(tmp_path: Path, name: str) -> None:
    content, command = WHOLE[name]
    with pytest.raises(UsageError) as caught:
        check({name: content}, tmp_path, max_reject_share=1)
    assert str(caught.value).startswith(f"{tmp_path}/{name}: ")
    assert command in str(caught.value)
    if shutil.which("jq") is None and "jq" in command:
        pytest.skip("the message is right; its command needs jq")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert check({"records.jsonl": (tmp_path / "records.jsonl").read_bytes()}, tmp_path)["sessions"] == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "2 of 2: invalid_json.*looks like a table"),
        (b"{'dialog': [['a']]}\n", "Python's notation"),
        (b"<html>\n</html>\n", "HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid 7\n", "git lfs pull"),
        (b"PAR1\x15\x04\x15", "is a Parquet file"),
        (b"nothing\n", "every line must be one JSON object"),
        (LINES.replace(b'"uid"', b'"score": NaN, "uid"'), "20 of 20: json_constant, the line holds NaN"),
        (b"\xff\xff\xff\n", "not text in UTF-8"),
        (b"\xff\xff\0\n", "not text, or packed in a way unknown here"),
    ],
)
def test_what_else_a_file_may_be(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)a.jsonl: .*{message}"):
        check({"a.jsonl": content}, tmp_path, max_reject_share=1)


def test_archives_are_told_though_most_of_their_lines_could_be_read(tmp_path: Path) -> None:
    make(tmp_path, {"a.jsonl": LINES})
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "a.jsonl", "a.jsonl")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.write(tmp_path / "a.jsonl", "a.jsonl")
    with pytest.raises(UsageError, match=r"a tar archive.*tar -xO -f a.tar.gz"):
        list(read_blocks(str(tmp_path / "a.tar.gz")))
    with pytest.raises(UsageError, match=r"a zip archive.*unzip -p a.zip"):
        list(read_blocks(str(tmp_path / "a.zip")))


def test_every_file_without_a_record_is_named_up_to_a_bound(tmp_path: Path) -> None:
    files = {f"{i}.json": b"[]\n" for i in range(8)} | {"good.jsonl": LINES * 100, "blank.jsonl": b"\n\n"}
    with pytest.raises(UsageError) as caught:
        check(files, tmp_path)
    message = str(caught.value)
    assert [f"{i}.json" in message for i in range(6)] == [True] * 5 + [False]
    assert "and 3 more files" in message
    assert "good" not in message
    assert "blank" not in message
