#!/usr/bin/env bash
# An S3 server, an MLflow server and a Ray cluster of two nodes, as processes of this machine: cluster/local.sh up |
# down | status. See README.md, also for which ports are open beyond the loopback. Needs `make setup`, and Linux.
#
# `up` starts what does not run, so it also brings back a server or a node that died. Everything is kept in
# .cache/cluster (or ARPLUS_CLUSTER), a private folder: addresses and secrets (env), logs, the buckets, MLflow's runs.
# `down` ends the processes and leaves the data.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STATE=${ARPLUS_CLUSTER:-$ROOT/.cache/cluster}
NODE_CPUS=${ARPLUS_NODE_CPUS:-3} # logical CPUs a Ray node: bookkeeping, as Ray knows nothing of the other node's
BIN=$ROOT/.venv/bin
# Two addresses of the loopback, so that the nodes are two hosts to Ray.
HEAD=127.0.0.2
NODE=127.0.0.3

umask 077

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# ---------------------------------------------------------------------------------------------------------- processes
# A pid file holds a process's id and its start time (field 22 of /proc/PID/stat), because ids are used again.

started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }

pid_of() { # NAME: its process id where it runs
    local pid since
    [ -e "$STATE/$1.pid" ] || return 1
    read -r pid since <"$STATE/$1.pid"
    [ "$(started_at "$pid")" = "$since" ] && printf '%s' "$pid"
}

start() { # NAME COMMAND…: in a session of its own, with its output in NAME.log
    local name=$1
    shift
    setsid nohup "$@" >"$STATE/$name.log" 2>&1 </dev/null &
    printf '%s %s\n' "$!" "$(started_at $!)" >"$STATE/$name.pid"
}

stop() { # NAME
    local pid
    if pid=$(pid_of "$1"); then
        kill -TERM "$pid" 2>/dev/null || true
        for _ in $(seq 150); do
            [ -n "$(started_at "$pid")" ] || break
            sleep 0.1
        done
        kill -KILL -- "-$pid" 2>/dev/null || true # what is left of its session
        say "$1: ended"
    fi
    rm -f "$STATE/$1.pid"
}

await() { # NAME SECONDS COMMAND…: until COMMAND succeeds
    local name=$1 end=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        pid_of "$name" >/dev/null || { tail -n 20 "$STATE/$name.log" >&2; fail "$name has ended; its log is $STATE/$name.log"; }
        [ "$SECONDS" -lt "$end" ] || { tail -n 20 "$STATE/$name.log" >&2; fail "$name is not ready; its log is $STATE/$name.log"; }
        sleep 0.3
    done
    say "$name: ready"
}

# ------------------------------------------------------------------------------------------------------------ servers

settle() { # ports and secrets, anew at every start of the whole
    "$BIN/python" - "$STATE" "$HEAD" "$NODE" "$BIN" <<'PYTHON'
import json, os, random, secrets, shlex, socket, sys
from pathlib import Path

state, head, node, programs = Path(sys.argv[1]), *sys.argv[2:]
random = random.SystemRandom()


def is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def take(names, twins=()):
    """Free ports below the range of outgoing connections, each with those that lie `twins` above it."""
    found = []
    while len(found) < len(names):
        port = random.randrange(12_000, 22_000)
        if port not in found and all(is_free(port + more) for more in (0, *twins)):
            found.append(port)
    return dict(zip(names, found))


# SeaweedFS: every gRPC port is the HTTP port + 10000.
ports = take(["S3_PORT", "MASTER_PORT", "VOLUME_PORT", "FILER_PORT", "ADMIN_PORT"], twins=[10_000])
ports |= take(["MLFLOW_PORT", "RAY_PORT", "DASHBOARD_PORT", "CLIENT_PORT", "HEAD_AGENT_PORT", "NODE_AGENT_PORT"])
assert len(set(ports.values())) == len(ports)

token = state / "token"
token.write_text(secrets.token_hex(32))
key, secret = "arplus", secrets.token_hex(20)
identity = {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}]}
identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
(state / "s3.json").write_text(json.dumps({"identities": [identity]}))
(state / "ports").write_text("".join(f"{name}={port}\n" for name, port in ports.items()))
user = {
    "RAY_API_SERVER_ADDRESS": f"http://{head}:{ports['DASHBOARD_PORT']}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": token,
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['S3_PORT']}",
    "AWS_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": key,
    "AWS_SECRET_ACCESS_KEY": secret,
    "AWS_EC2_METADATA_DISABLED": "true",
    "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['MLFLOW_PORT']}",
}
lines = ["unset RAY_ADDRESS RAY_AUTH_TOKEN AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT_URL_S3\n"]
lines += [f"export {name}={shlex.quote(str(value))}\n" for name, value in user.items()]
# No proxy can reach this machine's loopback. What the shell has set already stays.
own = f"localhost,127.0.0.1,{head},{node}"
lines += [f'export {name}="{own}${{{name}:+,${name}}}"\n' for name in ("no_proxy", "NO_PROXY")]
lines += [f'export PATH={shlex.quote(programs)}:"$PATH"\n']
(state / "env").write_text("".join(lines))
PYTHON
}

start_s3() {
    mkdir -p "$STATE/s3"
    start s3 env GOMEMLIMIT=300MiB "$BIN/weed" mini "-dir=$STATE/s3" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
        "-master.port=$MASTER_PORT" "-volume.port=$VOLUME_PORT" "-filer.port=$FILER_PORT" "-admin.port=$ADMIN_PORT" \
        "-s3.port=$S3_PORT" -s3.port.iceberg=0 -s3.port.lance=0 "-s3.config=$STATE/s3.json" \
        -s3.allowDeleteBucketNotEmpty=false -webdav=false -admin.ui=false -master.telemetry=false
}

s3_writes() {
    "$BIN/python" - <<'PYTHON'
import os
from pyarrow import fs

once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
client = fs.S3FileSystem(
    endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True, retry_strategy=once, connect_timeout=1
)
client.create_dir("arplus")
with client.open_output_stream("arplus/.ready") as stream:
    stream.write(b"")
PYTHON
}

start_mlflow() {
    mkdir -p "$STATE/mlflow"
    start mlflow env MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "$BIN/mlflow" server --workers 1 \
        --host 127.0.0.1 --port "$MLFLOW_PORT" --backend-store-uri "sqlite:///$STATE/mlflow/mlflow.db" \
        --artifacts-destination "$STATE/mlflow/artifacts"
}

mlflow_answers() { "$BIN/python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$MLFLOW_TRACKING_URI/health"; }

# Workers and drivers inherit the environment of their node: this is how they get S3's keys, MLflow's address and the
# token. --block ties a node's processes to the one that is started here. Each node has a folder of its own, as on two
# machines: in a shared one, one node unpacks a job's code again while the other runs it.
start_ray() { # NAME ADDRESS MORE…
    local name=$1 address=$2
    shift 2
    start "$name" env RAY_JOB_STOP_WAIT_TIME_S=30 GLOO_SOCKET_IFNAME=lo "$BIN/ray" start "$@" --block \
        --node-ip-address="$address" --num-cpus="$NODE_CPUS" --num-gpus=0 --object-store-memory=300000000 \
        --min-worker-port=0 --max-worker-port=0 --disable-usage-stats --temp-dir="$(cat "$STATE/ray")/$name"
}

start_head() {
    start_ray head "$HEAD" --head --port="$RAY_PORT" --dashboard-host="$HEAD" --dashboard-port="$DASHBOARD_PORT" \
        --ray-client-server-port="$CLIENT_PORT" --dashboard-agent-listen-port="$HEAD_AGENT_PORT"
}

start_node() { start_ray node "$NODE" --address="$HEAD:$RAY_PORT" --dashboard-agent-listen-port="$NODE_AGENT_PORT"; }

jobs_are_taken() {
    "$BIN/python" - "$RAY_API_SERVER_ADDRESS" "$STATE/token" <<'PYTHON'
import sys
import urllib.request
from pathlib import Path

header = {"Authorization": f"Bearer {Path(sys.argv[2]).read_text()}"}
urllib.request.urlopen(urllib.request.Request(f"{sys.argv[1]}/api/jobs/", headers=header), timeout=5)
PYTHON
}

node_has_joined() { grep -q 'Ray runtime started' "$STATE/node.log"; }

# -------------------------------------------------------------------------------------------------------------- verbs

load() {
    # shellcheck disable=SC1091
    source "$STATE/env"
    # shellcheck disable=SC1091
    source "$STATE/ports"
    export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
}

up() {
    [ -x "$BIN/ray" ] && [ -x "$BIN/weed" ] || fail "$BIN lacks Ray or SeaweedFS; run make setup first"
    mkdir -p "$STATE"
    chmod 700 "$STATE"
    if ! pid_of s3 >/dev/null && ! pid_of mlflow >/dev/null && ! pid_of head >/dev/null; then
        settle
    fi
    load
    pid_of s3 >/dev/null || start_s3
    pid_of mlflow >/dev/null || start_mlflow
    if ! pid_of head >/dev/null; then
        stop node # of a head that is gone
        mktemp -d /tmp/arplus-ray-XXXXXX >"$STATE/ray" # short: the sockets in it have at most 107 characters
        start_head
    fi
    await s3 60 s3_writes
    await head 120 jobs_are_taken
    pid_of node >/dev/null || start_node
    await node 120 node_has_joined
    await mlflow 180 mlflow_answers
    say
    say "In the shell that you submit from:"
    say "  source ${STATE#"$PWD/"}/env"
    say "Then, for example:"
    say "  ray job submit --working-dir . -- python jobs/synthesize.py --records 20000 --output s3://arplus/raw"
    say "  ray job submit --working-dir . -- python jobs/prepare.py --input s3://arplus/raw --output s3://arplus/data"
    say "  ray job submit --working-dir . -- python jobs/train.py arplus --tiny --data s3://arplus/data --storage s3://arplus/runs --run-name first --workers 2"
    say "MLflow: $MLFLOW_TRACKING_URI   Ray's dashboard (asks for the token in ${STATE#"$PWD/"}/token): $RAY_API_SERVER_ADDRESS"
}

down() {
    stop node
    stop head
    stop mlflow
    stop s3
    if [ -e "$STATE/ray" ]; then
        rm -rf "$(cat "$STATE/ray")" "$STATE/ray"
    fi
}

status() {
    local name pid missing=0
    for name in s3 mlflow head node; do
        if pid=$(pid_of "$name"); then
            say "$name: runs (process $pid)"
        else
            say "$name: does not run"
            missing=1
        fi
    done
    return $missing
}

case ${1-} in
    up | down | status) "$1" ;;
    *)
        printf 'usage: cluster/local.sh up | down | status\n' >&2
        exit 2
        ;;
esac
