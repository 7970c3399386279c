# Each of `make demo` and `make test` does all its own set-up; a second run reuses the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: types
types:  # links that give the root folders their import names, for type checkers
	@mkdir -p build/types/srdeploy
	@for folder in core models export calibration runtime cli; do ln -sfn ../../../$$folder build/types/srdeploy/$$folder; done
