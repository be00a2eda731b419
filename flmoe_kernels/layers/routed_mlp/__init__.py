"""RoutedMLP, its gates, and expert parallelism."""

from .ddp import prepare_for_ddp as prepare_for_ddp
from .gates import Gate as Gate
from .gates import GShardGate as GShardGate
from .gates import NaiveGate as NaiveGate
from .gates import NoisyGate as NoisyGate
from .gates import SwitchGate as SwitchGate
from .module import RoutedMLP as RoutedMLP
from .parallel import parallel_routed_mlp as parallel_routed_mlp
