"""Who computes each operator: this package's backends and their peers. One module per operator, each with

ORACLE           the contestant whose result in float64 is the exact one
PEERS            names of the others
lack(case, name) why this peer does not compute this case here, or ""
version(name)    of the package that computes
prepare(case, name, dtype)  the contestant, inputs made, computing in dtype from inputs rounded to the case's
"""
