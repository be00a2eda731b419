"""`python -m flmoe_kernels` is the command line of cli/main.py."""

from .cli.main import main

main()
