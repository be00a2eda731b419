"""Shared by every operator: backends, registration, validation, the native module."""
