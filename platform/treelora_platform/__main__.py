"""`python -m treelora_platform` is the `treelora` command."""

from treelora_platform.cli import main

main()
