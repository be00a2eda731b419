"""Inputs and calls of the operators.

Every module has `prepare(case, name, dtype)`: the call of a backend or the reference. pair_moe also has
`reference_unavailable_reason(case)`: the reason why the reference needs too much memory, or "".
"""
