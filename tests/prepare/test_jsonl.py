"""Lines of JSONL files, compressed or not, cut or broken."""

import bz2
import gzip
import lzma
import os
import struct
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from arplus.errors import RefusedError, UsageError
from arplus.prepare.archives import RangeReader
from arplus.prepare.jsonl import read_blocks

CASES = Path(__file__).parent.parent / "cases"


def skippable(size: int, kind: int = 0) -> bytes:
    """A frame of Zstandard that holds no data, as pzstd begins its files with."""
    return struct.pack("<II", 0x184D2A50 + kind, size) + bytes(size)


LINES = b"".join(b'{"n": %d, "text": "%s"}\n' % (i, b"x" * (i % 70)) for i in range(20_000))
HALF = LINES[: len(LINES) // 2]
FORMS = {
    "plain": LINES,
    "gz": gzip.compress(LINES),
    "gz of two members": gzip.compress(HALF) + gzip.compress(LINES[len(HALF) :]),
    "zst": zstandard.compress(LINES),
    "zst of two frames": zstandard.compress(HALF) + zstandard.compress(LINES[len(HALF) :]),
    "zst of skippable frames too": skippable(4)
    + skippable(300_000, 15)
    + zstandard.compress(HALF)
    + skippable(0, 7)
    + zstandard.compress(LINES[len(HALF) :])
    + skippable(9),
    "bz2": bz2.compress(LINES),
    "bz2 of two streams": bz2.compress(HALF) + bz2.compress(LINES[len(HALF) :]),
    "xz": lzma.compress(LINES),
    "xz of two streams": lzma.compress(HALF) + bytes(8) + lzma.compress(LINES[len(HALF) :]) + bytes(4),
}
PACKED = [form for form in FORMS if form != "plain"]


def read(path: Path, data: bytes, block_bytes: int) -> list[bytes]:
    path.write_bytes(data)
    blocks = list(read_blocks(str(path), block_bytes))
    assert [block.read for block in blocks][-1:] in ([], [len(data)])
    assert not any(block.left_out for block in blocks)
    return [block.lines for block in blocks]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.gz", "data.zst"], ids=["jsonl", "gz", "zst"])
def test_every_form_is_cut_at_line_ends_whatever_its_name(tmp_path: Path, form: str, name: str) -> None:
    for block_bytes in (1000, 100_000, 1 << 30):
        blocks = read(tmp_path / name, FORMS[form], block_bytes)
        assert b"".join(blocks) == LINES
        assert all(block.endswith(b"\n") for block in blocks)
        assert all(block_bytes <= len(block) < 2 * block_bytes + 100 for block in blocks[:-1])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd"), ("a.jsonl.bz2", "bzip2"), ("a.json.xz", "xz"), ("A.GZ", "gzip")],
)
def test_an_empty_compressed_file_is_cut_short(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}: the {kind} stream is cut short or damaged"):
        read(tmp_path / name, b"", 1000)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"a\nb", b"no line end " * 1000])
def test_odd_ends_are_kept(tmp_path: Path, data: bytes) -> None:
    assert b"".join(read(tmp_path / "x", data, 100)) == data


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("cut", [-5, -200, 20])
def test_a_cut_stream_is_an_error_that_names_the_file(tmp_path: Path, form: str, cut: int) -> None:
    path = tmp_path / "data"
    with pytest.raises(UsageError, match="stream is cut short or damaged") as caught:
        read(path, FORMS[form][:cut], 1000)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("rest", [b"garbage", LINES, b"\x1f", b"BZ"])
def test_what_follows_a_stream_and_is_none_is_an_error(tmp_path: Path, form: str, rest: bytes) -> None:
    with pytest.raises(UsageError, match="stream is cut short or damaged"):
        read(tmp_path / "data", FORMS[form] + rest, 1000)


def test_a_zstandard_window_that_is_too_large_is_told_from_damage(tmp_path: Path) -> None:
    data = (CASES / "long28.jsonl.zst").read_bytes()
    for before in (b"", FORMS["zst"], skippable(3)):
        with pytest.raises(UsageError, match=r"data: its Zstandard window is larger than 128 MiB.*--long=31 data"):
            read(tmp_path / "data", before + data, 1 << 20)


def test_a_zstandard_dictionary_is_told_from_damage(tmp_path: Path) -> None:
    samples = [b'{"n": %d, "m": "%d"}' % (i, i * 7) for i in range(3000)]
    packer = zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(2000, samples))
    with pytest.raises(UsageError, match="packed with a Zstandard dictionary"):
        read(tmp_path / "data", packer.compress(LINES), 1000)


def test_a_dictionary_of_xz_that_is_too_large_is_told_from_damage(tmp_path: Path) -> None:
    data = bytearray(lzma.compress(b"{}\n", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]))
    assert data[16] == 0  # the dictionary's size as the header of the first block codes it
    data[16] = 34  # 512 MiB
    data[20:24] = struct.pack("<I", zlib.crc32(data[12:20]))
    with pytest.raises(UsageError, match="more than 256 MiB"):
        read(tmp_path / "data", bytes(data), 1000)


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r", b"\r\n"])), st.integers(1, 5))
def test_every_end_of_a_line_becomes_a_line_feed(tmp_path_factory: pytest.TempPathFactory, pieces, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "ends"
    data = b"".join(pieces)
    path.write_bytes(data)
    found = b"".join(block.lines for block in read_blocks(str(path), size))
    assert found == data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def test_a_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    data = bytearray(FORMS["gz"])
    data[len(data) // 2 : len(data) // 2 + 8] = b"damaged!"
    with pytest.raises(UsageError, match="gzip stream is cut short or damaged"):
        read(tmp_path / "data", bytes(data), 1000)


@pytest.mark.parametrize("block_bytes", [100, 3000, 1 << 20])
def test_a_line_that_is_too_long_comes_alone_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("arplus.prepare.jsonl.MAX_LINE_BYTES", 5000)
    monkeypatch.setattr("arplus.prepare.jsonl.MAX_REJECT_BYTES", 50)
    lines = [b"a" * 4999, b"b" * 200_000, b"c", b"", b"d" * 40_000, b"e" * 50_000, b"f", b"g" * 9000]
    (tmp_path / "x").write_bytes(b"\n".join(lines))
    found: list[bytes] = []
    for block in read_blocks(str(tmp_path / "x"), block_bytes):
        if block.left_out:
            assert len(block.lines) == 50
            found.append(block.lines + bytes(block.left_out))
        else:
            found += block.lines.removesuffix(b"\n").split(b"\n")
    assert [len(line) for line in found] == [len(line) for line in lines]
    assert [line[:1] for line in found] == [line[:1] for line in lines]


def test_a_file_is_read_in_ranges_and_a_failed_one_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(LINES)
    failures = [RefusedError("s3://bucket/x: S3 refused or did not answer")] * 2

    def read_range(uri: str, start: int, size: int) -> bytes:
        if start > 10_000 and failures:
            raise failures.pop()
        return LINES[start : start + size]

    monkeypatch.setattr("arplus.storage.read_range", read_range)
    monkeypatch.setattr("arplus.storage.size", lambda uri: len(LINES))
    with RangeReader("s3://bucket/x", range_bytes=10_000) as file:
        assert file.peek(3) == LINES[:3]
        assert file.read(7) + file.readall() == LINES
        assert file.tell() == len(LINES)
    assert not failures


def test_a_file_that_shrinks_while_it_is_read_is_no_shorter_data_set(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"x" * 100_000)
    with RangeReader(str(file), range_bytes=10_000) as reader:
        os.truncate(file, 50_000)
        with pytest.raises(UsageError, match=r"x.jsonl: has become shorter while it was read"):
            reader.readall()
