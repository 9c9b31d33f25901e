# Everything a newcomer runs. Each target sets itself up: the first use creates .venv and installs what is pinned.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

CLIENTS := .venv-clients/.installed

COMPILED := out/compiled

.PHONY: compiled install demo serve test test-slow test-ray test-clients check format proto bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Weft needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: install          ## a small cluster on this machine, an agent session through it, a table
	$(BIN)/weft demo

serve: install         ## the default cluster, until interrupted
	$(BIN)/weft serve --cluster deploy/local.toml

test: install          ## what must always pass
	$(BIN)/pytest

test-slow: install     ## the long ones: wide identity runs, Ray clusters, killed nodes
	$(BIN)/pytest -m slow --timeout 1200

test-ray: install      ## a few of those: a killed node, two hosts
	$(BIN)/pytest -m ray --timeout 600

test-clients: install $(CLIENTS) ## clients and SDKs that are not ours, in Python and Node, each in an environment of its own
	$(BIN)/pytest -m clients

$(CLIENTS): tests/clients/requirements.txt tests/clients/node/package.json
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements.txt
	npm ci --prefix tests/clients/node --no-audit --no-fund
	touch $(CLIENTS)

check: install         ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# From a copy: what is built in place would be imported instead of what is edited.
compiled: install      ## out/compiled gets the packages with decisions and the simulator as C; needs a C compiler
	rm -rf $(COMPILED) $(COMPILED).source
	mkdir -p $(COMPILED).source
	cp -r pyproject.toml README.md LICENSE orchestrator workers deploy $(COMPILED).source
	HATCH_BUILD_HOOK_ENABLE_MYPYC=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(COMPILED) ./$(COMPILED).source
	rm -rf $(COMPILED).source

proto: install         ## regenerate the protobuf stubs
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. $$(cd proto && find . -name '*.proto' | sed 's#^\./##')

bench: install         ## what can be measured without a peer; bench/README.md has the others
	$(BIN)/python -m bench.index
	$(BIN)/python -m bench.core
	$(BIN)/python -m bench.turn
	$(BIN)/python -m bench.gateway
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.trace
	$(BIN)/python -m bench.simulate
	$(BIN)/python -m bench.cache_policy
	$(BIN)/python -m bench.fidelity

clean:
	rm -rf .venv .venv-clients tests/clients/node/node_modules out dist
