"""``--gpus-per-worker``, ``--accelerator-type`` and ``--label-selector`` on a cluster of three kinds of nodes."""

import re
from typing import Any

import pytest
from helpers.commands import run_worker


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, forked_workers: None) -> dict[str, Any]:
    return run_worker("placement_worker.py", tmp_path_factory.mktemp("runs"), timeout=250)


def test_labels_are_matched_as_ray_does(seen: dict[str, Any]) -> None:
    assert seen["qualify"] == {
        "zone=a": [["l4"], True],
        "zone=!a": [["a100", "head"], True],
        "zone=in(a,b)": [["a100", "l4"], True],
        "zone=!in(a,b)": [["head"], True],
        "zone=!in(a, c)": [["a100", "head"], True],
    }


def test_runs_share_a_gpu_of_the_kind_that_is_asked_for(seen: dict[str, Any]) -> None:
    """Two runs of half a GPU at once, on the only A100; two more GPUs are idle."""
    assert seen["side by side"] == 2
    assert seen["shared"] == [["a100", [0]], ["a100", [0]]]


def test_workers_go_where_the_label_is(seen: dict[str, Any]) -> None:
    node, gpus = seen["labelled"]
    assert node == "l4"
    assert len(gpus) == 1


def test_an_evaluation_takes_shares_of_the_gpus_that_it_is_given(seen: dict[str, Any]) -> None:
    assert seen["evaluated"] == ["a100", "a100"]


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        (
            "no such GPU",
            3,
            r"--accelerator-type H100: no living node qualifies; --device gpu waits for one; "
            r"there are (?=.*\): no kind of GPU, no label)(?=.*\): L4, zone=a)(?=.*\): A100, zone=b)",
        ),
        (
            "two workers, one such GPU",
            3,
            r"--workers 2: a worker takes one GPU and the cluster has 1 alive that qualify by --accelerator-type A100;",
        ),
        ("a shared GPU", 2, r"--gpus-per-worker: lets Ray put several workers of one run on one GPU, and NCCL refuses"),
        ("no such label", 3, r"--label-selector zone=c: no living node qualifies; --device"),
        (
            "too few CPUs",
            3,
            r"--workers 1: 1 workers × 2 CPUs \+ 1 CPU for the data feed = 3 CPUs, and the cluster has 5, 1 of them "
            r"where workers may be \(--label-selector zone=b\); it needs more CPUs",
        ),
    ],
)
def test_what_fits_nowhere_is_refused(seen: dict[str, Any], what: str, code: int, message: str) -> None:
    found = seen["refused"][what]
    assert found[0] == code
    assert re.match(message, found[1]), found[1]
