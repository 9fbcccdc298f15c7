"""A run for the tests, what MLflow holds of it, and a port that nobody listens on."""

import socket

from arplus.tracking import client, start_run


def begin(uri, **options):
    return start_run(uri, "tests", "a run", tags={"git": "abc"}, params={"optimizer.lr": 0.1}, **options)


def points(uri, run_id, key):
    return [(m.step, m.value) for m in client.connect(uri).get_metric_history(run_id, key)]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
