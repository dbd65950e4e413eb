"""`python -m batchery` is the `batchery` command."""

from batchery.cli.main import main

main()
