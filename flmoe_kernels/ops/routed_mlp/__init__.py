"""Routing of tokens to experts, and the experts' MLPs on the routed rows."""

from .api import Dispatch as Dispatch
from .api import Routing as Routing
from .api import dispatch as dispatch
from .api import gate as gate
from .api import limit as limit
from .api import routed_mlp as routed_mlp
