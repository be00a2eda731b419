"""Inputs and calls of the operators. Every module has

prepare(case, name, dtype)          the call of a backend or the reference
reference_unavailable_reason(case)  the reason why the reference cannot compute this case here, or ""
"""
