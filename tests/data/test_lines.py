import gzip
from pathlib import Path

import pytest
import zstandard

from arplus.data.lines import RangeReader, input_files, read_blocks
from arplus.errors import RefusedError, UserError

LINES = b"".join(b'{"n": %d, "text": "%s"}\n' % (i, b"x" * (i % 70)) for i in range(20_000))
HALF = LINES[: len(LINES) // 2]
FORMS = {
    "plain": LINES,
    "gz": gzip.compress(LINES),
    "gz of two members": gzip.compress(HALF) + gzip.compress(LINES[len(HALF) :]),
    "zst": zstandard.compress(LINES),
    "zst of two frames": zstandard.compress(HALF) + zstandard.compress(LINES[len(HALF) :]),
}


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


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")])
def test_an_empty_compressed_file_is_cut_short(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: the {kind} stream is cut short or damaged"):
        read(tmp_path / name, b"", 1000)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"a\nb", b"no line end " * 1000])
def test_odd_ends_are_kept(tmp_path: Path, data: bytes) -> None:
    assert b"".join(read(tmp_path / "x", data, 100)) == data


@pytest.mark.parametrize("form", ["gz", "gz of two members", "zst", "zst of two frames"])
@pytest.mark.parametrize("cut", [-1, -9, -3000, 20])
def test_a_cut_stream_is_an_error_that_names_the_file(tmp_path: Path, form: str, cut: int) -> None:
    path = tmp_path / "data"
    with pytest.raises(UserError, match="stream is cut short or damaged") as caught:
        read(path, FORMS[form][:cut], 1000)
    assert str(path) in str(caught.value)


def test_a_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    data = bytearray(FORMS["gz"])
    data[len(data) // 2 : len(data) // 2 + 8] = b"damaged!"
    with pytest.raises(UserError, match="gzip stream is cut short or damaged"):
        read(tmp_path / "data", bytes(data), 1000)


def test_a_folder_s_record_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl.gz", "a.jsonl", "sub/c.json", "notes.md", "_SUCCESS.txt", ".hidden.jsonl", "d.zst", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = [Path(file).relative_to(tmp_path).as_posix() for file in input_files(str(tmp_path))]
    assert names == ["a.jsonl", "b.jsonl.gz", "e.txt", "sub/c.json"]
    assert input_files(str(tmp_path / "d.zst")) == [str(tmp_path / "d.zst")]


@pytest.mark.parametrize("mark", ["manifest.json", "_lease.json"])
def test_hidden_folders_and_prepared_data_sets_are_no_records(tmp_path: Path, mark: str) -> None:
    names = ("a.jsonl", "_temporary/b.jsonl", "x/.git/c.txt", "x/d.jsonl", f"x/out/{mark}", "x/out/rejects/e.jsonl.gz")
    for name in (*names, "x/outer/f.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = [Path(file).relative_to(tmp_path).as_posix() for file in input_files(str(tmp_path))]
    assert found == ["a.jsonl", "x/d.jsonl", "x/outer/f.json"]


def test_no_file_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record file"):
        input_files(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        input_files(str(tmp_path / "absent"))


@pytest.mark.parametrize("block_bytes", [100, 3000, 1 << 20])
def test_a_line_that_is_too_long_comes_alone_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("arplus.data.lines.MAX_LINE_BYTES", 5000)
    monkeypatch.setattr("arplus.data.lines.MAX_REJECT_BYTES", 50)
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
