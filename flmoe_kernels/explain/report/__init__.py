"""The command `explain`: read files, explain samples, write results and a page."""
