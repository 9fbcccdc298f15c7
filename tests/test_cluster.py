"""The files of ``cluster/`` and ``docker/`` as Ray, Kubernetes and Docker read them."""

import copy
import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from arplus import cli

ROOT = Path(__file__).parent.parent
CRDS = Path(os.environ.get("ARPLUS_CRDS", ROOT.parent / "shared" / "crds"))
KUBERAY = ROOT / "cluster" / "kuberay"
JOBS = ("prepare", "train", "tune", "ablate", "evaluate")

needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"KubeRay's CRDs are not part of the repository; none in {CRDS} (ARPLUS_CRDS)"
)


def build(job, more=()):
    """The RayJob that `kubectl apply -k` makes of a job's folder: the template, and its patches (RFC 6902)."""
    found = yaml.safe_load((KUBERAY / "job" / "rayjob.yaml").read_text())
    found = json.loads(json.dumps(found))  # what is shared by anchors becomes each one's own
    (patch,) = yaml.safe_load((KUBERAY / job / "kustomization.yaml").read_text())["patches"]
    for change in [*yaml.safe_load(patch["patch"]), *more]:
        *way, last = (part.replace("~1", "/") for part in change["path"].split("/")[1:])
        place = functools.reduce(lambda at, key: at[int(key) if isinstance(at, list) else key], way, found)
        assert last in place, change
        if change["op"] == "remove":
            del place[last]
        else:
            place[last] = change["value"]
    return found


MANIFESTS = {
    "RayCluster": yaml.safe_load((KUBERAY / "raycluster.yaml").read_text()),
    **{job: build(job) for job in JOBS},
}


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods_of(manifest):
    """The pod templates of a manifest: the head's, the workers', and the submitter's if it has one."""
    cluster = cluster_of(manifest)
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    return [*pods, *filter(None, [manifest["spec"].get("submitterPodTemplate")])]


PODS = [
    pytest.param(pod, id=f"{name}-{n}") for name, found in MANIFESTS.items() for n, pod in enumerate(pods_of(found))
]


# ----------------------------------------------------------------------------------------------------------- KubeRay


@functools.cache
def crd_schema(kind, version):
    # Megabytes of YAML, which libyaml reads in a tenth of the time.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=loader)
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version)
    schema = closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def closed(schema):
    """An OpenAPI schema as an API server reads it strictly: no unknown properties, integers where strings may be."""
    if not isinstance(schema, dict):
        return [closed(item) for item in schema] if isinstance(schema, list) else schema
    result = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return result


def defaulted(value, schema):
    """``value`` with the schema's defaults filled in and nulls dropped, as an API server does before it validates."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        value = {k: v for k, v in value.items() if v is not None}
        for key, sub in properties.items():
            if key not in value and "default" in sub:
                value[key] = copy.deepcopy(sub["default"])
        return {k: defaulted(v, properties.get(k, extra if isinstance(extra, dict) else {})) for k, v in value.items()}
    if isinstance(value, list):
        return [defaulted(item, schema.get("items", {})) for item in value]
    return value


def validate(manifest):
    group, version = manifest["apiVersion"].split("/")
    assert group == "ray.io"
    schema = crd_schema(manifest["kind"], version)
    error = next(jsonschema.Draft202012Validator(schema).iter_errors(defaulted(manifest, schema)), None)
    if error is not None:
        raise error


def test_the_patches_of_the_guides_fit_the_template():
    text = (ROOT / "cluster" / "README.md").read_text() + (ROOT / "docs" / "weekly.md").read_text()
    patches = yaml.safe_load("\n".join(lines := re.findall(r"- \{op: .*", text)))
    assert len(patches) == len(lines) == 7
    (group,) = cluster_of(build("train", patches))["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["nvidia.com/gpu"] == "8"


@needs_crds
@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_would_accept_the_manifest(name):
    validate(MANIFESTS[name])


@pytest.mark.parametrize("job", JOBS)
def test_kustomize_makes_the_same_of_a_jobs_folder(job):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    done = subprocess.run([kubectl, "kustomize", KUBERAY / job], capture_output=True, text=True, timeout=60)
    assert yaml.safe_load(done.stdout) == MANIFESTS[job], done.stderr


def _misspell(spec):
    spec["shutdownAfterJobFinish"] = True


def _wrong_type(spec):
    spec["activeDeadlineSeconds"] = "two days"


def _no_template(spec):
    del spec["rayClusterSpec"]["headGroupSpec"]["template"]


def _deep_misspell(spec):
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagee"] = "x"


@needs_crds
@pytest.mark.parametrize("break_it", [_misspell, _wrong_type, _no_template, _deep_misspell])
def test_a_broken_manifest_is_caught(break_it):
    manifest = build("train")
    break_it(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest)


def kubernetes_problems(pod):
    """What Kubernetes' own schema says about a pod template, strictly read; empty when nothing."""
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]}
    program = Path(sys.executable).with_name("kubernetes-validate")
    if not program.exists():
        pytest.skip("kubernetes-validate is not installed; `make setup` installs it")
    done = subprocess.run(
        [program, "--strict", "-"], input=yaml.safe_dump(manifest), capture_output=True, text=True, timeout=60
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("pod", PODS)
def test_kubernetes_would_accept_the_pods(pod):
    assert kubernetes_problems(pod) == ""


def test_a_broken_pod_is_caught():
    pod = copy.deepcopy(pods_of(MANIFESTS["RayCluster"])[0])
    pod["spec"]["serviceAccount_name"] = "x"
    assert "serviceAccount_name" in kubernetes_problems(pod)


@pytest.mark.parametrize("pod", PODS)
def test_pods_are_confined_and_bounded(pod):
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"]["memory"]


def test_workers_have_shared_memory_and_a_gpu_where_they_train():
    for name, manifest in MANIFESTS.items():
        (container,) = pods_of(manifest)[1]["spec"]["containers"]
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]
        for amounts in container["resources"].values():
            assert amounts.get("nvidia.com/gpu") == (None if name == "prepare" else "1")


@pytest.mark.parametrize("job", JOBS)
def test_a_retried_job_goes_on_and_ends(job):
    spec = MANIFESTS[job]["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0
    assert not [key for key in spec if key.startswith("entrypoint") and key != "entrypoint"], "drivers stay on the head"


@pytest.mark.parametrize("job", JOBS)
def test_the_jobs_command_is_one_that_the_job_takes(job, monkeypatch):
    """What makes a retry go on, the run's name, is written down in each command that has one."""
    program, script, *arguments = MANIFESTS[job]["spec"]["entrypoint"].split()
    assert (program, script) == ("python", f"/app/jobs/{job}.py")
    read, validate = [], cli.validate

    def parsed(config):
        read.append(validate(config))
        raise SystemExit

    monkeypatch.setattr(cli, "validate", parsed)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]()
    run = getattr(read[0], "run", read[0])
    (group,) = cluster_of(MANIFESTS[job])["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    if job in ("train", "tune", "ablate"):
        assert run.run_name == {"train": "arplus-1", "tune": "sweep-1", "ablate": "study-1"}[job]
    if job == "train":
        assert run.workers == group["replicas"]
    if job != "prepare":
        assert run.device == "gpu"


# --------------------------------------------------------------------------------------------------------------- AWS


def check_aws(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def aws():
    return yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())


def test_ray_up_would_accept_the_configuration():
    check_aws(aws())


@pytest.mark.parametrize("key", ["max_worker", "head_node_typ"])
def test_a_misspelt_aws_configuration_is_caught(key):
    with pytest.raises(jsonschema.ValidationError):
        check_aws(aws() | {key: 1})


def test_an_aws_configuration_without_its_head_is_caught():
    config = aws()
    del config["available_node_types"]["head"]
    with pytest.raises(ValueError, match="head"):
        check_aws(config)


def test_aws_credentials_are_roles_and_tokens_are_on():
    config = aws()
    for node in config["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"]["Name"].startswith("arplus-")
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


# ------------------------------------------------------------------------------------------------------------ images


def hadolint(dockerfile):
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed; `make setup` installs it")
    return subprocess.run([program, "-"], input=dockerfile, capture_output=True, text=True, timeout=60)


def test_the_dockerfile_is_clean():
    done = hadolint((ROOT / "docker" / "Dockerfile").read_text())
    assert done.returncode == 0, done.stdout


def test_a_broken_dockerfile_is_caught():
    broken = (ROOT / "docker" / "Dockerfile").read_text().replace("python:3.11-slim-bookworm", "python:latest")
    assert "DL3007" in hadolint(broken).stdout


def test_the_image_has_what_the_jobs_need(tmp_path):
    """All but what tests and benchmarks need; the Dockerfile's own command says what is installed."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    (command,) = re.findall(r"^RUN (python -c .*?) > requirements.txt", text, flags=re.MULTILINE | re.DOTALL)
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = {*project["dependencies"], *extras["demo"], *extras["vectors"], *extras["pretrained"]}
    assert {"torch", "jieba"} <= needed == set(found.stdout.split())


def test_no_container_is_root_in_the_end():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[2:]
    assert [stage.split()[2] for stage in stages] == ["cpu", "cuda"]
    for stage in stages:
        assert re.findall(r"^USER (\S+)$", stage, flags=re.MULTILINE)[-1] == "1000"


def test_ray_up_finds_in_the_image_what_it_calls():
    """Ray rsyncs through `docker exec`, runs ssh on the head, and reads HOME from the image's variables."""
    base = (ROOT / "docker" / "Dockerfile").read_text().split("FROM base")[0]
    (installed,) = re.findall(r"apt-get install (.*) \\", base)
    assert {"openssh-client", "rsync"} <= set(installed.split())
    (home,) = re.findall(r"\bHOME=(\S+)", base)
    assert "--create-home --uid 1000 ray" in base
    assert home == "/home/ray"
    assert [path for path in aws()["file_mounts"] if path.startswith(f"{home}/")] == list(aws()["file_mounts"])


def test_everything_runs_the_same_ray():
    from importlib.metadata import version

    assert {cluster_of(manifest)["rayVersion"] for manifest in MANIFESTS.values()} == {version("ray")}


@pytest.mark.parametrize("path", [ROOT / "cluster" / "aws.yaml", *KUBERAY.rglob("*.yaml")], ids=str)
def test_no_secret_is_written_down(path):
    text = path.read_text()
    assert not re.search(r"(SECRET|ACCESS_KEY|PASSWORD|TOKEN)\w*\s*[:=]\s*\S", text)
    assert not re.search(r"://[^/\s]+@", text)


# --------------------------------------------------------------------------------------------------------- local.sh


def local_sh(state, *arguments):
    """``cluster/local.sh`` on a folder of its own, as far as it starts nothing."""
    command = [ROOT / "cluster" / "local.sh", *arguments]
    environment = os.environ | {"ARPLUS_CLUSTER": str(state)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_local_cluster_that_is_not_there(tmp_path):
    status = local_sh(tmp_path, "status")
    assert status.returncode == 1
    assert status.stdout.count("does not run") == 4
    assert local_sh(tmp_path, "down").returncode == 0
    assert local_sh(tmp_path, "restart").returncode == 2
    assert local_sh(tmp_path).stderr == "usage: cluster/local.sh up | down | status\n"


def test_a_local_cluster_ends_only_what_it_started(tmp_path):
    """Its pid files outlive a reboot, after which the same number is some other process."""
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "s3.pid").write_text(f"{other.pid} 1\n")
        assert "s3: does not run" in local_sh(tmp_path, "status").stdout
        assert local_sh(tmp_path, "down").returncode == 0
        assert other.poll() is None
        other.kill()


def test_a_job_that_is_stopped_has_time_to_save():
    for manifest in MANIFESTS.values():
        (head,) = pods_of(manifest)[0]["spec"]["containers"]
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "30"} in head["env"]
    assert "--env RAY_JOB_STOP_WAIT_TIME_S=30" in aws()["docker"]["run_options"]
    assert "RAY_JOB_STOP_WAIT_TIME_S=30" in (ROOT / "cluster" / "local.sh").read_text()


def test_a_job_takes_the_code_along_and_no_secret(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    source = tmp_path / "source"
    for name in (".cache/cluster/env", ".cache/cluster/token", ".venv/bin/python", "runs/x/config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    for name in ("arplus/cli.py", "jobs/train.py"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("x")
    shutil.copy(ROOT / ".rayignore", source)
    create_package(str(source), tmp_path / "package.zip", include_gitignore=True)
    sent = [name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")]
    assert sorted(sent) == [".rayignore", "arplus/cli.py", "jobs/train.py"]
