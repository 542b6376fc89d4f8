# Four commands under the names that people try first. Each makes the environment it needs (.venv) and can be called again.
.PHONY: quickstart test quality docs

quickstart:  ## from a fresh clone to a tuned model, with answers before and after
	./scripts/quickstart.sh

test:  ## the full test set; the quick part of it: ./scripts/test.sh --quick
	./scripts/test.sh

quality:  ## formatting, lint, types
	./scripts/quality.sh

docs:  ## the pages of docs/ as a site in site/
	./scripts/docs.sh
