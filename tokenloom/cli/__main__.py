"""`python -m tokenloom.cli`: the same as the `tokenloom` command."""

from tokenloom.cli.main import main

main()
