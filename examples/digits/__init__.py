"""Demo on real digits: training, swap, comparison of layers, exact explanations.

    python -m examples.digits [--out demo_out] [--seed 0] [--quick]

The modules in reading order: data, train, measure, token_pairs, pipeline; report and figure show the results.
"""
