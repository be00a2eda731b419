"""Indices of token pairs: what they are, how they are estimated, and the results."""
