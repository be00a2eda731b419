"""Routing of tokens to experts."""

from .api import Dispatch as Dispatch
from .api import Routing as Routing
from .api import dispatch as dispatch
from .api import gate as gate
from .api import limit as limit
