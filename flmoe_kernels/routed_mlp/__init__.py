"""Routing of tokens to experts, the experts' MLPs on the routed rows, and the module of both."""

from .api import Dispatch as Dispatch
from .api import Routing as Routing
from .api import dispatch as dispatch
from .api import gate as gate
from .api import limit as limit
from .api import routed_mlp as routed_mlp
from .gates import Gate as Gate
from .gates import GShardGate as GShardGate
from .gates import NaiveGate as NaiveGate
from .gates import NoisyGate as NoisyGate
from .gates import SwitchGate as SwitchGate
from .module import RoutedMLP as RoutedMLP
from .parallel import parallel_routed_mlp as parallel_routed_mlp
from .parallel import prepare_for_ddp as prepare_for_ddp
