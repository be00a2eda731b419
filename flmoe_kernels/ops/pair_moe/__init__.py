"""Token-pair gated mixture of interaction experts."""

from .api import PairMoEOutput as PairMoEOutput
from .api import TopPairs as TopPairs
from .api import pair_map as pair_map
from .api import pair_moe as pair_moe
from .api import top_pairs as top_pairs
from .kinds import KINDS as KINDS
from .kinds import swap_sides as swap_sides
