"""Inputs and calls of each operator, one module each, with

prepare(case, name, dtype)  the call of a backend or the reference
reference_unavailable_reason(case)        why the reference cannot compute this case here, or ""
"""
