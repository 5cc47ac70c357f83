"""`python -m shardwright`: the same as the `shardwright` command."""

from shardwright.cli.main import main

main()
