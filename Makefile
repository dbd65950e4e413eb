# The two commands of the README, and those that a contributor needs besides.
.PHONY: demo test check install bench

demo: ## Run a real file of requests through a server and a simulated model, all on this machine
	@./scripts/install
	@rm -rf demo-output && mkdir demo-output
	.venv/bin/batchery run examples/requests.jsonl -o demo-output/results.jsonl --upstream simulator
	@echo
	@echo "The first of the results, which are in demo-output/results.jsonl:"
	@head -n 2 demo-output/results.jsonl

test: ## Pass the tests
	@./scripts/test

check: ## Format, lint, types, imports
	@./scripts/check

install: ## Make .venv
	@./scripts/install

bench: ## Measure; see docs/benchmarks.md
	@./scripts/install
	.venv/bin/python -m benchmarks.end_to_end
