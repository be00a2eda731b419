"""The kernels of each operator as cases; cases.py puts them together."""
