"""Four tasks on real digits: train the published layer, swap it, compare both, explain a prediction.

    python -m examples.digits [--out demo_out] [--seed 0] [--quick]

The modules in reading order: data, train, measure, token_pairs, pipeline; report and figure show the results.
"""
