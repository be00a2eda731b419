"""`python -m flmoe_kernels` is the command line of cli.py."""

from flmoe_kernels.cli import main

main()
