"""Cases of each operator's kernels; cases.py collects them."""
