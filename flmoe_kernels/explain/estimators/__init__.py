"""Indices of token pairs: definitions, exact and Monte Carlo estimators, results."""
