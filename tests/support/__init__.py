"""Inputs, stand-ins and helpers shared by tests."""
