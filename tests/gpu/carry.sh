#!/usr/bin/env bash
# For a machine with a GPU that has Python 3.12 and torch, but no network: builds a folder to take there, beside this
# repository, with the packages that it lacks (Ray, DeepSpeed, MLflow, …), without what no job of run.py opens, and data.
#
#   tests/gpu/carry.sh FOLDER [COMMIT]     # COMMIT: also the package of this commit, to measure beside
#
# There, in the repository's root:  FOLDER/run.sh [settings of run.py]
# PYTHON (python3.12) has pip; WORK keeps downloads; `make setup` was run here, since the data set is made here.
set -euo pipefail
cd "$(dirname "$0")/../.."
FOLDER=$(realpath -m "${1:?folder}") COMMIT=${2:-} PYTHON=${PYTHON:-python3.12}
WORK=${WORK:-${TMPDIR:-/tmp}/arplus-carry}
WHEELS=$WORK/wheels SITE=$WORK/site
mkdir -p "$WHEELS" "$FOLDER"

LACKS="ray deepspeed mlflow mlflow-skinny mlflow-tracing boto3 botocore jmespath s3transfer isal optuna orjson pydantic
pydantic_core annotated-types typing-inspection typing-extensions tyro docstring-parser typeguard zstandard alembic SQLAlchemy Mako sqlparse
opencensus opencensus-context aiohttp-cors colorful smart-open hjson jsonschema jsonschema-specifications referencing
rpds-py tensorboardX colorlog cachetools databricks-sdk importlib_metadata opentelemetry-api opentelemetry-proto
opentelemetry-sdk opentelemetry-semantic-conventions opentelemetry-exporter-prometheus google-auth google-api-core
googleapis-common-protos proto-plus pyasn1 pyasn1_modules cryptography cffi pycparser greenlet fastapi starlette uvicorn
python-dotenv GitPython gitdb smmap Flask flask-cors blinker itsdangerous graphene graphql-core graphql-relay docker
huey prettytable wcwidth gunicorn skops"
PLATFORMS=$(for n in 39 35 34 31 28 27 24 17; do echo "--platform manylinux_2_${n}_x86_64"; done)
PLATFORMS="$PLATFORMS --platform manylinux2014_x86_64 --platform manylinux1_x86_64"
FOR312="--no-deps --only-binary=:all: --python-version 3.12 --implementation cp $PLATFORMS"
for name in $LACKS; do
  pin=$(grep -i -E "^${name//[-_]/[-_]}==" constraints.txt || echo "$name")
  file=$(echo "${pin%%==*}-${pin##*==}" | tr 'A-Z' 'a-z' | sed 's/[-_.]\+/[-_.]/g')
  ls "$WHEELS" | tr 'A-Z' 'a-z' | grep -q "^$file-" && continue
  if [ "$name" = deepspeed ]; then # a source distribution: plain Python, as long as no operator is built
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv/bin/python -m pip wheel -q --no-deps --no-build-isolation -w "$WHEELS" "$pin"
  else
    "$PYTHON" -m pip download -q $FOR312 -d "$WHEELS" "$pin" || echo "not found: $pin" >&2
  fi
done

rm -rf "$SITE" && mkdir -p "$SITE"
"$PYTHON" -m pip install -q --no-index --no-compile --no-warn-conflicts $FOR312 --target "$SITE" "$WHEELS"/*.whl
(
  cd "$SITE"
  rm -rf bin ray/jars ray/rllib ray/llm ray/dashboard/client mlflow/server/js
  # The dashboard, by which Ray Train watches its controller, ends at once where this folder is missing.
  mkdir -p ray/dashboard/client/build/static && echo '<html></html>' > ray/dashboard/client/build/index.html
  find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts -exec rm -rf {} +
  find . -name '*.pyi' -delete
  find . -name __pycache__ -prune -exec rm -rf {} +
)
tar -C "$SITE" -c . | nice xz -T0 -6 --lzma2=preset=6,dict=128MiB > "$FOLDER/site.tar.xz"

if [ ! -f "$WORK/data/manifest.json" ]; then
  job() { nice .venv/bin/python "jobs/$1.py" "${@:2}"; }
  rm -rf "$WORK/raw" "$WORK/data"
  job synthesize --records "${RECORDS:-30000}" --persona-answers 0.5 --seed 1 --output "$WORK/raw"
  job prepare --input "$WORK/raw" --output "$WORK/data" --valid 0.02 --test 0.02
  PYTHONPATH=tests/gpu .venv/bin/python -c "import pathlib, run; run.repeat(pathlib.Path('$WORK/data'), 16)"
fi
tar -C "$WORK" -c data | nice xz -6 > "$FOLDER/data.tar.xz"
rm -rf "$FOLDER/before"
if [ -n "$COMMIT" ]; then mkdir "$FOLDER/before" && git archive "$COMMIT" arplus | tar -x -C "$FOLDER/before"; fi

cat > "$FOLDER/run.sh" <<'RUN'
#!/usr/bin/env bash
# run.py with what is beside this file; W keeps it unpacked from call to call.
set -eu
HERE=$(realpath "$(dirname "$0")") W=${W:-/tmp/arplus-gpu}
if [ ! -d "$W/data" ]; then
  mkdir -p "$W/site"
  tar -C "$W/site" -xJf "$HERE/site.tar.xz" & tar -C "$W" -xJf "$HERE/data.tar.xz"; wait %1
  python3 -m compileall -q -j 0 "$W/site" arplus tests > /dev/null 2>&1 || true # else each of Ray's processes does it
fi
grep -qw "$(hostname)" /etc/hosts || echo "127.0.0.1 $(hostname)" >> /etc/hosts || true
unset RAY_ADDRESS
export PYTHONPATH="$W/site"
exec python3 tests/gpu/run.py --data "$W/data" "$@"
RUN
chmod +x "$FOLDER/run.sh"
du -sm "$FOLDER"/*
