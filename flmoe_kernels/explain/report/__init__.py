"""Implementation of the command `explain`: input files, explanations, results and a page."""
