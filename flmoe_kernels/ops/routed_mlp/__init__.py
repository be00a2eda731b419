"""The experts' MLPs on routed rows."""

from .api import routed_mlp as routed_mlp
