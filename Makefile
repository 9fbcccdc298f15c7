# make demo | quick | test | check | soak | gpu | clean. The first one that is called sets up .venv (README.md).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.DELETE_ON_ERROR:
.PHONY: help setup demo quick test test-ray test-rest check soak gpu benchmark-deps clean

help:
	@echo "make demo    records -> data set -> training -> evaluation -> replies, on this machine"
	@echo "make quick   the tests that need neither Ray nor servers, for a first change"
	@echo "make test    the tests, without the long proofs"
	@echo "make check   lint, format, types, spelling"
	@echo "make soak    the long proofs"
	@echo "make gpu     on a machine with a GPU: is it right there, and how fast is it"
	@echo "make setup   only set up $(VENV)"
	@echo "make benchmark-deps   what jobs/benchmark.py compares with: datasets, duckdb, polars, transformers"
	@echo "make clean   remove $(VENV), the demo's output and caches"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; try: make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python lacks venv; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) (2.5 GB with a CPU build of torch, more with a CUDA build; some minutes) ..."
	@rm -f $@
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq -c constraints.txt -e '.[demo,test]'
	@$(BIN)/pip check
	@touch $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/python jobs/synthesize.py --records 40000 --duplicates 400 --broken 40 --persona-answers 0.9 --chatterbot --seed 1 --output $(DEMO)/raw
	$(BIN)/python jobs/prepare.py --input $(DEMO)/raw --output $(DEMO)/data --valid 0.02 --test 0.02
	$(BIN)/python jobs/train.py arplus --tiny --data $(DEMO)/data --storage $(DEMO)/runs --run-name demo --max-steps 1100 --log-every 100 --seed 1 --model.gate-start 1 --model.fixed-attention 1 --model.dropout 0
	$(BIN)/python jobs/evaluate.py --checkpoint $(DEMO)/runs/demo --data $(DEMO)/data --json $(DEMO)/evaluation.json
	@echo
	@echo "The same question to two personas:"
	$(BIN)/python jobs/chat.py --checkpoint $(DEMO)/runs/demo --gender 男 --location 北京 --tags '篮球;电影' --say '你是男生还是女生？' --seed 1
	$(BIN)/python jobs/chat.py --checkpoint $(DEMO)/runs/demo --gender 女 --location '广东 广州' --tags '美食;旅游' --say '你是男生还是女生？' --seed 1
	@echo
	@echo "See the run in MLflow, then open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning in a browser:"
	@echo "  $(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///$(DEMO)/runs/mlflow.db"
	@echo "Train on your own data (one JSON record per line; the form is in README.md):"
	@echo "  $(BIN)/python jobs/prepare.py --input YOUR_RECORDS --output data"
	@echo "  $(BIN)/python jobs/train.py arplus --data data --run-name first"

# In as many processes as there are cores, each with one thread: most of a light test is imports and small tensors.
quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not soak and not ray and not processes"

# Beside each other: those that share a Ray mostly wait, and the others compute meanwhile. More processes take longer.
test: setup
	@echo "pytest runs twice, side by side, on all that needs a Ray and on the rest: about 8 minutes on two cores."
	@echo "What each of them says is shown when it ends."
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-ray test-rest

test-ray:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak and ray"

test-rest:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak and not ray"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/codespell

soak: setup
	$(BIN)/python -m pytest -m soak

# Not run yet; some eight minutes on an H100, by a guess. build/gpu holds what was found.
gpu: setup
	$(BIN)/python tests/gpu/run.py

benchmark-deps: setup
	$(BIN)/pip install -qq -c constraints.txt -e '.[benchmark]'
	$(BIN)/pip check

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
