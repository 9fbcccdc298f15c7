"""Names of files and folders, here and on S3: which are taken, and what is in or beside what."""

import re
from pathlib import Path
from urllib.parse import quote

import pytest

from arplus import storage
from arplus.errors import UsageError


def test_local_uris_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.absolute("runs/") == str(tmp_path / "runs")
    assert storage.absolute("~/runs") == str(tmp_path / "home" / "runs")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"
    storage.write_bytes(f"file://{tmp_path}/there", b"x")
    assert storage.read_bytes("there") == b"x"
    assert storage.list_files(f"file://{tmp_path}") == [f"file://{tmp_path}/there"]


def test_join_makes_one_slash() -> None:
    assert storage.join("s3://b/", "c", "d") == storage.join("s3://b", "c", "d") == "s3://b/c/d"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "hdfs://host/x", "https://host/x"])
def test_other_schemes_are_refused(uri: str) -> None:
    assert not storage.is_local(uri)
    for function in (storage.resolve, storage.exists, storage.read_bytes, storage.list_files, storage.delete):
        with pytest.raises(UsageError, match=f"^{uri}: only local paths and s3:// URIs are supported$"):
            function(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3:key"])
def test_s3_needs_a_bucket(uri: str) -> None:
    with pytest.raises(UsageError, match=f"^{uri}: names no bucket"):
        storage.resolve(uri)


def test_a_file_address_is_absolute(tmp_path: Path) -> None:
    for uri in (f"file:{tmp_path}/x", f"FILE://{tmp_path}/x"):
        assert storage.resolve(uri)[1] == storage.absolute(uri) == f"{tmp_path}/x"
    for odd in ("a b", "100%", "a?b#c", "a%20b", "对话"):
        uri = f"file://localhost{tmp_path}/{quote(odd)}"
        storage.write_bytes(storage.join(uri, "100%"), odd.encode())
        assert (tmp_path / odd / "100%").read_text() == odd
        assert storage.list_files(uri) == [f"{uri}/100%25"] == [storage.join(uri, "100%")]
        storage.write_bytes(f"{tmp_path}/{odd}/100%", b"a plain path is no URL")
        assert storage.read_bytes(f"{uri}/100%25") == b"a plain path is no URL"
    for uri in ("file:///a?b", "file:///a#b", "file:///100%", "file:///%zz", "file:///%B6", "file:///%00"):
        with pytest.raises(UsageError, match=f"^{re.escape(uri)}: .* the plain path"):
            storage.resolve(uri)
    for uri in ("file:x", "file://host/x", "file://", "file:", "C:/x", "~nobody-here/x", "", "a\0b"):
        with pytest.raises(UsageError):
            storage.resolve(uri)


def test_within_is_the_folder_or_below_it() -> None:
    for uri, folder in (("a", "a"), ("a/b/", "a"), ("file:///x/y", "/x/"), ("s3://b/x/y", "s3://b/x"), ("a", "/")):
        assert storage.within(uri, folder)
    for uri, folder in (("ab", "a"), ("a", "a/b"), ("a/../c", "a"), ("s3://b/xy", "s3://b/x"), ("s3://b/x", "/b")):
        assert not storage.within(uri, folder)


@pytest.mark.parametrize(
    ("uri", "beside"),
    [
        ("raw", "data"),
        ("demo/raw/", "demo/data"),
        ("/raw", "/data"),
        ("s3://b/raw", "s3://b/data"),
        ("s3://b", "s3://b/data"),
    ],
)
def test_what_is_beside_a_folder(uri: str, beside: str) -> None:
    assert storage.beside(uri, "data") == beside
