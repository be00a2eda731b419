"""Inputs, stand-ins and helpers that tests share."""
