"""What tests of a backend need: inputs with ragged lengths and masks, and the error budget."""

from .budget import assert_outside_budget as assert_outside_budget
from .budget import assert_within_budget as assert_within_budget
from .inputs import MASK_PATTERNS as MASK_PATTERNS
from .inputs import as_dtype as as_dtype
from .inputs import cumulative as cumulative
from .inputs import draw as draw
from .inputs import draw_masks as draw_masks
from .inputs import draw_replacements as draw_replacements
from .inputs import gradients as gradients
from .inputs import make_seed as make_seed
from .layers import LayerCase as LayerCase
from .layers import assert_layer_within_budget as assert_layer_within_budget
from .layers import named_outputs as named_outputs
from .layers import outputs_and_gradients as outputs_and_gradients
