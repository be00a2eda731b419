"""Concentration of importance, and its overlap between experts."""
