"""Operators, a package each: api, reference, registration, backends."""
