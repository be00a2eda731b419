"""Preparation of a model with expert parallelism for DistributedDataParallel."""

from __future__ import annotations

from torch import nn

from .module import RoutedMLP


def prepare_for_ddp(model: nn.Module) -> list[str]:
    """Exclude experts that exist on only one rank from DistributedDataParallel; call it before wrapping the model.

    The expert parameters of every RoutedMLP with world_size above 1 are neither broadcast nor reduced.
    mean_gradients is set on these layers, so that the experts' gradients, like all others, are those of the mean
    of the ranks' objectives. A second call changes nothing.

    Returns:
        The names of all parameters and buffers of `model` that DistributedDataParallel ignores.
    """
    layers = [m for m in model.modules() if isinstance(m, RoutedMLP) and m.world_size > 1]
    for layer in layers:
        layer.mean_gradients = True
    own = {id(p) for layer in layers for p in layer.experts.parameters()}
    # A layer with two attributes that refer to it has two names.
    named = model.named_parameters(remove_duplicate=False)
    names = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    names += [name for name, p in named if id(p) in own and name not in names]
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, names)
    return names
