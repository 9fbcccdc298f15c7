"""Jobs and their workers ask this machine and the cluster past the user's proxy, and everything else through it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import ray
from helpers.answers import Answers, serving

from arplus import proxies

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")
JOB = """
import json, os, sys
import ray, requests
from arplus import cli
from arplus.cluster import connection

def ask(places):
    from ray.util.state import list_nodes
    assert list_nodes(ray.get_runtime_context().gcs_address)
    said = []
    for place in places:
        try:
            said.append(requests.get(place, timeout=5).text)
        except OSError:
            said.append("nobody there")
    return said + [os.environ["no_proxy"].split(",")]

def main():
    connection.connect(cpus=1)
    places, worker = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    in_worker = ray.remote(num_cpus=0, runtime_env={"env_vars": worker})(ask)
    print(json.dumps([ask(places), ray.get(in_worker.remote(places))]))

cli.run(main)
"""
"""Asks Ray and other places, itself and by a worker, which has variables of its own as its node may have."""


class Proxy(ThreadingHTTPServer):
    """Says to each request that it was asked, and notes what for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []


class Answer(Answers):
    server: Proxy

    def answer(self) -> None:
        self.server.asked.append(self.path)
        self.say(200, b"proxy")


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    running = Proxy()
    with serving(running):
        yield running


@pytest.mark.ray
@pytest.mark.parametrize("joined", [False, True])
def test_no_request_for_the_cluster_reaches_the_proxy(
    joined: bool, proxy: Proxy, request: pytest.FixtureRequest
) -> None:
    there = dict.fromkeys(PROXIES, f"http://127.0.0.1:{proxy.server_port}")
    environment = {k: v for k, v in os.environ.items() if k.lower() not in (*PROXIES, "no_proxy", "no_grpc_proxy")}
    environment |= there | {"no_proxy": "mine.invalid", "NO_PROXY": "yours.invalid", "no_grpc_proxy": "his.invalid"}
    environment = {k: v for k, v in environment.items() if not k.startswith("RAY_")}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"  # asks the internet
    if joined:
        request.getfixturevalue("ray_cluster")
        environment |= {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    places = ["http://mlflow.invalid/", "http://127.0.0.1:9/", "http://mine.invalid/", "http://yours.invalid/"]
    command = [sys.executable, "-c", JOB, json.dumps(places), json.dumps(there)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for *said, names in json.loads(done.stdout):
        assert said == ["proxy", "nobody there", "nobody there", "nobody there"]
        if joined:
            assert {node["NodeManagerAddress"] for node in ray.nodes()} <= set(names)
        assert not [asked for asked in proxy.asked if urlsplit(asked).hostname in names]
    assert proxy.asked.count("http://mlflow.invalid/") == 2


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", " mine.example.org,.own.example.org,")
    proxies.bypass(["10.1.2.3"])
    found = os.environ["no_proxy"].split(",")
    assert found[:2] == ["mine.example.org", ".own.example.org"]
    assert {"localhost", "127.0.0.1", "::1", "10.1.2.3"} < set(found)
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
    assert "no_grpc_proxy" not in os.environ, "gRPC then reads no_proxy"
    monkeypatch.setenv("no_grpc_proxy", "grpc.example.org")
    proxies.bypass(["10.1.2.4"])
    assert {"grpc.example.org", "10.1.2.4"} < set(os.environ["no_grpc_proxy"].split(","))  # noqa: SIM112
    assert len(set(found)) == len(found)
    monkeypatch.setenv("no_proxy", "*")
    proxies.bypass(["10.1.2.5"])
    assert os.environ["NO_PROXY"] == proxies.for_workers()["no_proxy"] == "*"
