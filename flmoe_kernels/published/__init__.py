"""Layers and checkpoints of the published code, replaced by fast layers.

The modules are the steps of that work; each uses earlier ones only:

    file       read and write checkpoint files
    infer      the architecture, from keys and shapes
    recognise  the published layers inside a model
    convert    state dicts and modules, into ours
    agreement  error budgets for the outputs of two layers
    calls      inputs to compare them on
    compare    whether both layers compute the same
    report     what was replaced, and what was not and why
    swap       the steps put together
"""
