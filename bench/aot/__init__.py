"""What the compiler makes of every Triton kernel, and what arithmetic says of its speed, without a GPU.

`python -m bench.aot` compiles the launches that `cases.all_cases` lists for the architectures of
`architectures`, lays registers, shared memory, occupancy and bounds side by side, and holds them to a budget.
"""
