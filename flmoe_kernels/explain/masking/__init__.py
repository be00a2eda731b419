"""Masking evaluation: how much a logit drops when explained tokens are masked."""
