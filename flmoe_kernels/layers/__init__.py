"""torch.nn modules on the operators."""
