"""Both S3 clients are told the same, whoever says it; and a store without conditional writes is found out."""

import json
import os
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest

from arplus import s3, storage
from arplus.errors import ResourceError, UsageError
from arplus.prepare.lease import Lease
from arplus.prepare.sources import find_files
from arplus.runs import attempt

VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets variables, and the text of AWS's configuration file, where nothing else is set."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower() in VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def set_(profile: str = "", **variables: str) -> None:
        (tmp_path / "AWS_CONFIG_FILE").write_text(profile)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_


def test_the_environment_and_the_profile_are_read_as_aws_says(settings: Any, tmp_path: Path) -> None:
    profile = "[default]\nregion = eu-west-3\nendpoint_url = http://profile:1\ns3 =\n  addressing_style = virtual\n"
    settings(profile)
    found = s3.find_connection()
    assert (found.endpoint, found.region, found.addressing_style) == ("http://profile:1", "eu-west-3", "virtual")
    settings(profile, AWS_REGION="eu-north-1", AWS_ENDPOINT_URL="http://general:1")
    found = s3.find_connection()
    assert (found.endpoint, found.region) == ("http://general:1", "eu-north-1")
    settings(profile, AWS_ENDPOINT_URL_S3="https://own:1")
    assert s3.find_connection().endpoint == "https://own:1"
    settings(profile, AWS_IGNORE_CONFIGURED_ENDPOINT_URLS="true")
    assert s3.find_connection().endpoint is None
    services = "[services mine]\ns3 =\n  endpoint_url = http://service:1\n[profile other]\nservices = mine\n"
    settings(services, AWS_PROFILE="other", AWS_IGNORE_CONFIGURED_ENDPOINT_URLS="false", AWS_ENDPOINT_URL_S3="")
    assert s3.find_connection().endpoint in ("http://service:1", "http://general:1")
    (tmp_path / "ca.pem").write_text("")
    settings(AWS_PROFILE="default", AWS_CA_BUNDLE=str(tmp_path / "ca.pem"))
    settings("[default]\n", https_proxy="http://proxy:8", AWS_ENDPOINT_URL="https://general:1")
    assert s3.find_connection().ca_bundle == str(tmp_path / "ca.pem")
    assert s3.find_connection().proxy == "http://proxy:8"
    settings("[default]\n", no_proxy="general")
    assert s3.find_connection().proxy is None


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "AWS_ENDPOINT_URL=127.0.0.1:9000: must begin with http:// or https"),
        ({"AWS_ENDPOINT_URL": "http://me:hunter2@h:1"}, r"AWS_ENDPOINT_URL=http://\*\*\*@h:1: must not hold a user"),
        ({"AWS_ENDPOINT_URL": "http://"}, "AWS_ENDPOINT_URL=http://: must be http://HOST:PORT"),
        ({"AWS_ENDPOINT_URL": "http://h:99999"}, "AWS_ENDPOINT_URL=http://h:99999: must be http://HOST:PORT"),
        ({"AWS_ENDPOINT_URL": "http://[::1"}, "AWS_ENDPOINT_URL=.*: must be http://HOST:PORT"),
        ({"AWS_ENDPOINT_URL": "http://h", "http_proxy": "ftp://h"}, "http_proxy=ftp://h: must begin with http"),
        (
            {"AWS_ENDPOINT_URL": "http://h", "http_proxy": "http://me:hunter2@:x"},
            r"http_proxy=http://\*\*\*@:x: must be",
        ),
        ({"AWS_ACCESS_KEY_ID": "alone"}, "AWS's keys: .*AWS_SECRET_ACCESS_KEY"),
        ({"AWS_PROFILE": "nobody"}, "AWS's settings: .*nobody.*check AWS_PROFILE"),
        ({"AWS_CA_BUNDLE": "/no/such.pem"}, "AWS_CA_BUNDLE=/no/such.pem: no such file"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings: Any, variables: dict[str, str], said: str) -> None:
    settings(**variables)
    for use in (storage.exists, Lease.take):
        with pytest.raises(UsageError, match=said):
            use("s3://bucket/key")


def test_a_profile_alone_serves_files_and_leases(s3_server: Any, settings: Any, tmp_path: Path) -> None:
    there = s3_server.environment
    settings(f"[profile p]\nregion = {there['AWS_REGION']}\nendpoint_url = {there['AWS_ENDPOINT_URL']}\n")
    keys = [f"{k} = {there[k.upper()]}" for k in ("aws_access_key_id", "aws_secret_access_key")]
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text("\n".join(["[p]", *keys]))
    settings((tmp_path / "AWS_CONFIG_FILE").read_text(), AWS_PROFILE="p")
    output = s3_server.uri(f"profile-{uuid4().hex}")
    lease = Lease.take(output)
    storage.write_bytes(f"{output}/file", b"mine")
    assert [uri.rpartition("/")[2] for uri in storage.list_files(output)] == ["_lease.json", "file"]
    lease.release(finished=True)


def test_the_endpoint_of_s3_alone_comes_first(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(s3_server.uri("endpoint"), b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.environment["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert storage.read_bytes(s3_server.uri("endpoint")) == b"x"


def test_credentials_are_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a machine's metadata, as on EC2; once for all threads."""
    asked: list[str] = []
    keys = {"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "a", "SecretAccessKey": "s", "Token": "t"}

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            metadata = self.path.startswith("/latest/")
            asked.extend([self.path] * metadata)
            body = b"role"
            if self.path.endswith("/role"):
                body = json.dumps(keys | {"Expiration": "2099-01-01T00:00:00Z"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                monkeypatch.delenv(name)
            monkeypatch.setenv("HOME", str(tmp_path))
            monkeypatch.setenv("AWS_REGION", "us-east-1")
            for name in ("AWS_ENDPOINT_URL", "AWS_EC2_METADATA_SERVICE_ENDPOINT"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
            assert storage.exists("s3://bucket/key")
            once = len(asked)
            assert once > 0
            with ThreadPoolExecutor(4) as threads:
                assert all(threads.map(storage.exists, ["s3://bucket/key"] * 20))
            assert len(asked) == once
        finally:
            server.shutdown()


KEYS_OF_A_ROLE = """
<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>ROLE{number}</AccessKeyId>
<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>{until}</Expiration>
</Credentials></AssumeRoleResult></AssumeRoleResponse>"""


def test_keys_of_a_role_serve_both_clients_and_are_renewed(settings: Any, tmp_path: Path) -> None:
    """pyarrow's own chain has no such profiles. Keys that end within minutes are renewed at each use."""
    given: list[int] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            given.append(len(given) + 1)
            until = datetime.now(UTC) + timedelta(minutes=5)
            body = KEYS_OF_A_ROLE.format(number=given[-1], until=until.isoformat()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    profile = "[profile p]\nregion = us-east-1\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = base\n"
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(
        "[base]\naws_access_key_id = base\naws_secret_access_key = s\n"
    )
    with store() as (endpoint, asked), ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sts = f"http://127.0.0.1:{server.server_port}"
        settings(profile, AWS_PROFILE="p", AWS_ENDPOINT_URL=endpoint, AWS_ENDPOINT_URL_STS=sts)
        with pytest.raises(UsageError, match="no such file"):
            storage.read_bytes("s3://bucket/key")
        with pytest.raises(UsageError, match="ignores the conditions"):
            Lease.take("s3://bucket/out")
        kept = pickle.dumps(storage.resolve_lasting("s3://bucket/key")[0])
        before = len(given)
        with pytest.raises(FileNotFoundError):
            pickle.loads(kept).open_input_file("bucket/key")
        assert len(given) > before, "what is kept for long asks anew"
        server.shutdown()
    assert b"ROLE" not in kept
    assert {key.rstrip("0123456789") for *_, key in asked} == {"ROLE"}


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("credential_process = false", "AWS's keys: .*credential"),
        ("credential_process = /no/such/program", "AWS's keys: .*/no/such/program"),
        ("role_arn = arn:aws:iam::1:role/r\nsource_profile = gone", "AWS's keys: .*gone"),
        ("sso_session = x\nsso_account_id = 1\nsso_role_name = r", "AWS's keys: .*"),
        ("s3 =\n  addressing_style = dns", "addressing_style = dns: must be auto, path or virtual"),
        ("region = eu west", "AWS_REGION=eu west: is not a region's name"),
    ],
)
def test_a_profile_that_gives_no_keys_is_named(settings: Any, profile: str, said: str) -> None:
    settings(f"[default]\n{profile}\n")
    for use in (storage.exists, Lease.take):
        with pytest.raises(UsageError, match=f"(?s){said}"):
            use("s3://bucket/key")


def test_keys_of_a_process_and_those_that_a_file_changes_to(settings: Any, tmp_path: Path) -> None:
    keys = {"Version": 1, "AccessKeyId": "PROCESS", "SecretAccessKey": "s"}
    (tmp_path / "keys.json").write_text(json.dumps(keys))

    def all_keys() -> set[str]:
        del asked[:]
        with pytest.raises(UsageError, match="no such file"):
            storage.read_bytes("s3://bucket/key")
        with pytest.raises(UsageError, match="ignores the conditions"):
            Lease.take("s3://bucket/out")
        return {key for *_, key in asked}

    with store() as (endpoint, asked):
        settings(f"[default]\ncredential_process = cat {tmp_path}/keys.json\n", AWS_ENDPOINT_URL=endpoint)
        assert all_keys() == {"PROCESS"}
        for name in ("FIRST", "SECOND"):  # as a login of every hour writes them
            text = f"[default]\naws_access_key_id = {name}\naws_secret_access_key = s\n"
            (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(text)
            os.utime(tmp_path / "AWS_SHARED_CREDENTIALS_FILE", (len(name), len(name)))
            assert all_keys() == {name}


LISTED = "<Contents><Key>{key}</Key><Size>3</Size><LastModified>2020-01-01T00:00:00.000Z</LastModified></Contents>"


class _Store(BaseHTTPRequestHandler):
    """Answers as a store that has nothing, and notes what it is asked."""

    protocol_version = "HTTP/1.1"  # else botocore waits a second for leave to send
    status, code = 200, ""
    keys: tuple[str, ...] = ()
    asked: list[tuple[str, str, str, str]]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = self.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        self.asked.append((self.command, self.path, self.headers["Host"], key))
        if self.command == "PUT":
            status = self.status if {"If-Match", "If-None-Match"} & set(self.headers) else 200
        else:
            status = 204 if self.command == "DELETE" else 404
        code = self.code if self.command == "PUT" else "NoSuchKey"
        body = f"<Error><Code>{code}</Code></Error>".encode() if status >= 300 else b""
        if self.keys and "list-type" in self.path:
            status, found = 200, "".join(LISTED.format(key=key) for key in self.keys)
            body = f"<ListBucketResult>{found}<KeyCount>{len(self.keys)}</KeyCount></ListBucketResult>".encode()
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def store(
    status: int = 200, code: str = "", keys: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    asked: list[tuple[str, str, str, str]] = []
    handler = type("Store", (_Store,), {"status": status, "code": code, "asked": asked, "keys": keys})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}


def test_both_clients_take_the_proxy_and_address_the_bucket_by_its_host(settings: Any) -> None:
    with store() as (proxy, asked):
        profile = "[default]\ns3 =\n  addressing_style = virtual\n"
        settings(profile, AWS_ENDPOINT_URL="http://store.example", http_proxy=proxy, **KEYS)
        with pytest.raises(ResourceError, match="NO_SUCH_KEY"):  # this one cannot even list
            storage.exists("s3://bucket/some/key")
        with pytest.raises(UsageError, match="ignores the conditions"):
            Lease.take("s3://bucket/out")
    hosts = {host for _, _, host, _ in asked}
    assert hosts == {"bucket.store.example"}
    assert all("bucket.store.example" in path for _, path, _, _ in asked), "as one asks a proxy"
    assert any("some/key" in path for _, path, _, _ in asked)
    assert any("out/_lease.json" in path for _, path, _, _ in asked)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (200, "", "this S3 store ignores the conditions of conditional writes"),
        (501, "NotImplemented", "this S3 store refuses conditional writes"),
        (400, "NotImplemented", "this S3 store refuses conditional writes"),
        (400, "ExpiredToken", "S3 refused or did not answer"),
    ],
)
def test_a_store_without_conditional_writes_is_named(settings: Any, status: int, code: str, said: str) -> None:
    with store(status, code) as (endpoint, asked):
        settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        with pytest.raises(UsageError, match=f"s3://bucket/out/_lease.json: {said}"):
            Lease.take("s3://bucket/out")
    assert ("DELETE" in {command for command, *_ in asked}) == (status == 200), "no lease is left behind"


@pytest.mark.parametrize(("status", "code"), [(200, ""), (501, "NotImplemented"), (400, "InvalidRequest")])
def test_a_run_can_be_taken_over_in_a_store_without_conditional_writes(settings: Any, status: int, code: str) -> None:
    with store(status, code) as (endpoint, asked):
        settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        assert attempt.take_over("s3://bucket/run", "m").number == 0
    assert asked[-1][:2] == ("PUT", "/bucket/run/attempt.json")
    assert len(asked) == (2 if status == 200 else 3)


SAME_IN_BOTH = [
    "a b",
    " a ",
    "100%",
    "a%2Fb",
    "a%20b",
    "a+b",
    "a#b",
    "a?b=c",
    "a&b",
    "a'b",
    'a"b',
    "a\\b",
    "a:b@c",
    "对话",
]
SAME_IN_BOTH += ["a;b=1", "a!b$(c)", "{a}", "[a]", "<a>", "a|b^c`d", "a~b*c", "e\u0301", "a/", "a/b//"]


def test_both_clients_take_the_same_key(settings: Any) -> None:
    with store() as (endpoint, asked):
        settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        for key in SAME_IN_BOTH:
            del asked[:]
            output = storage.absolute(f"s3://bucket/{key}")
            with pytest.raises(UsageError, match="no such file"):
                storage.read_bytes(f"{output}/_lease.json")
            with pytest.raises(UsageError, match="ignores the conditions"):
                Lease.take(output)
            paths = {path.partition("?")[0] for _, path, _, _ in asked}
            assert paths == {f"/bucket/{quote(key.rstrip('/'), safe='/~')}/_lease.json"}


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        *(
            (f"s3://bucket/{key}", "holds //, /./ or /../")
            for key in ("a//b", "/a", "a/./b", "a/../b", "../other", "..")
        ),
        *((f"s3://{name}", "is not a bucket's name") for name in ("my bucket/x", "b?x=y/z", "b#x", "桶/x")),
        ("S3:///key", "names no bucket"),
        ("s3:/bucket/key", "names no bucket"),
    ],
)
def test_a_key_that_the_clients_take_differently_is_refused(settings: Any, uri: str, said: str) -> None:
    with store() as (endpoint, asked):
        settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        for use in (storage.absolute, storage.exists, storage.read_bytes, storage.delete, Lease.take):
            with pytest.raises(UsageError, match=f"^{re.escape(uri)}: .*{re.escape(said)}"):
                use(uri)
    assert asked == []


def test_a_listed_key_is_not_read_under_another_name(settings: Any) -> None:
    keys = (
        "in//a.jsonl",
        "in/./b.jsonl",
        "in/../c.jsonl",
        "in//manifest.json",
        "in/x//y.jsonl",
        "in/d.jsonl",
        "in/e#?.json",
    )
    with store(keys=keys) as (endpoint, _):
        settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        found = find_files("s3://bucket/in")
    assert found.records == ["s3://bucket/in/d.jsonl", "s3://bucket/in/e#?.json"]
    assert {item.name for item in found.left_out} >= {
        "/a.jsonl",
        "./b.jsonl",
        "../c.jsonl",
        "/manifest.json",
        "x//y.jsonl",
    }
