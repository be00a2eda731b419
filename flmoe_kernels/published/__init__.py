"""Replacement of the published code's layers and checkpoints by fast layers.

The modules are the steps; each imports earlier modules only:

    layout     finds layers in the contents of a file
    file       reads and writes checkpoint files
    infer      infers the architecture from keys and shapes
    places     finds the published layers inside a model
    recognise  checks whether a layer can be replaced
    source     recognises published source code, and what the fast layer would lose; fingerprints is its table
    convert    converts state dicts and modules
    agreement  error budgets for the outputs of two layers
    calls      inputs for the comparison
    runs       runs of both layers on the same inputs
    differences  behaviours that differ by design, measured
    compare    compares the outputs of both layers
    report     the replaced layers, and the other layers with the reason
    swap       the public functions
"""
