"""Explanations as matplotlib figures that are readable in black and white; pyplot is not used."""
