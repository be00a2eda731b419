"""What tests of a backend need: inputs with ragged lengths and masks, and the error budget."""

from flmoe_kernels.core.error_budget import assert_outside_budget as assert_outside_budget
from flmoe_kernels.core.error_budget import assert_within_budget as assert_within_budget
from tests.support.inputs import MASK_PATTERNS as MASK_PATTERNS
from tests.support.inputs import as_dtype as as_dtype
from tests.support.inputs import cumulative as cumulative
from tests.support.inputs import draw as draw
from tests.support.inputs import draw_masks as draw_masks
from tests.support.inputs import draw_replacements as draw_replacements
from tests.support.inputs import gradients as gradients
from tests.support.inputs import make_seed as make_seed
from tests.support.layers import LayerCase as LayerCase
from tests.support.layers import assert_layer_within_budget as assert_layer_within_budget
from tests.support.layers import named_outputs as named_outputs
from tests.support.layers import outputs_and_gradients as outputs_and_gradients
