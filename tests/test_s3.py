"""Both S3 clients are told the same, whoever says it; and a store without conditional writes is found out."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from helpers.empty_store import KEYS, store

from arplus import s3, storage
from arplus.errors import ArplusError, ResourceError, UsageError
from arplus.prepare.lease import Lease
from arplus.prepare.sources import find_files
from arplus.runs import attempt


def test_the_environment_and_the_profile_are_read_as_aws_says(aws_settings: Any, tmp_path: Path) -> None:
    profile = "[default]\nregion = eu-west-3\nendpoint_url = http://profile:1\ns3 =\n  addressing_style = virtual\n"
    aws_settings(profile)
    found = s3.find_connection()
    assert (found.endpoint, found.region, found.addressing_style) == ("http://profile:1", "eu-west-3", "virtual")
    aws_settings(profile, AWS_REGION="eu-north-1", AWS_ENDPOINT_URL="http://general:1")
    found = s3.find_connection()
    assert (found.endpoint, found.region) == ("http://general:1", "eu-north-1")
    aws_settings(profile, AWS_ENDPOINT_URL_S3="https://own:1")
    assert s3.find_connection().endpoint == "https://own:1"
    aws_settings(profile, AWS_IGNORE_CONFIGURED_ENDPOINT_URLS="true")
    assert s3.find_connection().endpoint is None
    services = "[services mine]\ns3 =\n  endpoint_url = http://service:1\n[profile other]\nservices = mine\n"
    aws_settings(services, AWS_PROFILE="other", AWS_IGNORE_CONFIGURED_ENDPOINT_URLS="false", AWS_ENDPOINT_URL_S3="")
    assert s3.find_connection().endpoint in ("http://service:1", "http://general:1")
    (tmp_path / "ca.pem").write_text("")
    aws_settings(AWS_PROFILE="default", AWS_CA_BUNDLE=str(tmp_path / "ca.pem"))
    aws_settings("[default]\n", https_proxy="http://proxy:8", AWS_ENDPOINT_URL="https://general:1")
    assert s3.find_connection().ca_bundle == str(tmp_path / "ca.pem")
    assert s3.find_connection().proxy == "http://proxy:8"
    aws_settings("[default]\n", no_proxy="general")
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
def test_a_setting_that_cannot_be_is_named(aws_settings: Any, variables: dict[str, str], said: str) -> None:
    aws_settings(**variables)
    for use in (storage.exists, Lease.take):
        with pytest.raises(ArplusError, match=said) as caught:
            use("s3://bucket/key")
        assert caught.value.exit_code == 2


def test_a_profile_alone_serves_files_and_leases(s3_server: Any, aws_settings: Any, tmp_path: Path) -> None:
    there = s3_server.environment
    aws_settings(f"[profile p]\nregion = {there['AWS_REGION']}\nendpoint_url = {there['AWS_ENDPOINT_URL']}\n")
    keys = [f"{k} = {there[k.upper()]}" for k in ("aws_access_key_id", "aws_secret_access_key")]
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text("\n".join(["[p]", *keys]))
    aws_settings((tmp_path / "AWS_CONFIG_FILE").read_text(), AWS_PROFILE="p")
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


def test_both_clients_take_the_proxy_and_address_the_bucket_by_its_host(aws_settings: Any) -> None:
    with store() as (proxy, asked):
        profile = "[default]\ns3 =\n  addressing_style = virtual\n"
        aws_settings(profile, AWS_ENDPOINT_URL="http://store.example", http_proxy=proxy, **KEYS)
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
def test_a_store_without_conditional_writes_is_named(aws_settings: Any, status: int, code: str, said: str) -> None:
    with store(status, code) as (endpoint, asked):
        aws_settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        with pytest.raises(ArplusError, match=f"s3://bucket/out/_lease.json: {said}") as caught:
            Lease.take("s3://bucket/out")
        assert caught.value.exit_code == 2
    assert ("DELETE" in {command for command, *_ in asked}) == (status == 200), "no lease is left behind"


@pytest.mark.parametrize(("status", "code"), [(200, ""), (501, "NotImplemented"), (400, "InvalidRequest")])
def test_a_run_can_be_taken_over_in_a_store_without_conditional_writes(
    aws_settings: Any, status: int, code: str
) -> None:
    with store(status, code) as (endpoint, asked):
        aws_settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
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


@pytest.mark.processes
def test_both_clients_take_the_same_key(aws_settings: Any) -> None:
    with store() as (endpoint, asked):
        aws_settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
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
def test_a_key_that_the_clients_take_differently_is_refused(aws_settings: Any, uri: str, said: str) -> None:
    with store() as (endpoint, asked):
        aws_settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        for use in (storage.absolute, storage.exists, storage.read_bytes, storage.delete, Lease.take):
            with pytest.raises(UsageError, match=f"^{re.escape(uri)}: .*{re.escape(said)}"):
                use(uri)
    assert asked == []


def test_a_listed_key_is_not_read_under_another_name(aws_settings: Any) -> None:
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
        aws_settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        found = find_files("s3://bucket/in")
    assert found.records == ["s3://bucket/in/d.jsonl", "s3://bucket/in/e#?.json"]
    assert {item.name for item in found.left_out} >= {
        "/a.jsonl",
        "./b.jsonl",
        "../c.jsonl",
        "/manifest.json",
        "x//y.jsonl",
    }
