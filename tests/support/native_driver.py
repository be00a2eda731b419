"""Driver that runs all CPU kernels for sanitizers, with the module that is given.

    python -m tests.support.native_driver MODULE [control]

torch allocates exactly the bytes of a tensor, so that AddressSanitizer checks both ends. New memory is NaN, if the
sanitizer fills it. `control` is the name of a deliberate mistake, for which the sanitizer must end the process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Iterable
from typing import Any


def load(path: str) -> Any:
    """Load the module before torch, which would give it an OpenMP pool: its own pool of threads runs."""
    spec = importlib.util.spec_from_file_location("flmoe_kernels._native", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module, module.parallel_pool()


native, POOL = load(sys.argv[1])

# ruff: noqa: E402
import torch
from torch import Tensor

from flmoe_kernels import pair_map, top_pairs
from flmoe_kernels.core.native import native as loaded
from flmoe_kernels.ops.encoder.api import encoder_inference
from flmoe_kernels.ops.encoder.inference import layer_shapes
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support import attention_cases, encoder_cases, every_operator, pair_cases, routed_cases
from tests.support.inputs import as_dtype, cumulative, draw
from tests.support.operator_cases import DTYPES, OPS, evaluate, loss_arguments
from tests.support.routing_twin import Twin, random_index


def shifted(x: Tensor, by: int) -> Tensor:
    """The same values after an offset of `by` elements."""
    return torch.cat([x.new_zeros(by), x.flatten()])[by:].view_as(x)


def attention(dtype: torch.dtype, shift: int) -> Iterable[list[Tensor]]:
    for case in (*attention_cases.SMALL, attention_cases.LARGE[-1]):
        qkv = [shifted(x, shift) for x in case.qkv(dtype)]
        yield attention_cases.run(case, qkv, "cpu")
        if case.groups is not None:
            tail = (case.cu_seqlens, None, 0.0, 0.5)
            yield evaluate(
                lambda x, tail=tail: OPS.expert_attention_packed(x, *tail)[0],
                [torch.stack(qkv, dim=2).requires_grad_()],
                1,
            )


def encoder(dtype: torch.dtype, shift: int) -> Iterable[list[Tensor]]:
    sizes = itertools.product((0, 1, 7, 97), (1, 3, 17, 64, 130), (0.0, 0.4))
    for rows, width, p in sizes:
        calls = encoder_cases.operator_calls(dtype, p, rows, width)
        # Both products have several panels and a ragged edge.
        calls["expert_mlp wide"] = encoder_cases.mlp_arguments(2, rows, (width, 131, 66), p)
        for name, arguments in calls.items():
            if name == "dropout_add_pool" and not rows:
                continue  # its segments need a row
            inputs = as_dtype(arguments, dtype)
            floats = [isinstance(x, Tensor) and x.dtype == dtype for x in inputs]
            inputs = [
                shifted(x, shift).requires_grad_() if is_float else x
                for x, is_float in zip(inputs, floats, strict=True)
            ]
            outputs = 2 if name.startswith("dropout_add_norm") else 1
            yield evaluate(getattr(OPS, name.split()[0]), inputs, outputs)
    for shape in ((4, 3, 1, 1), (5, 4, 5, 7), (7, 6, 2, 33), (4, 3, 3, 130)):
        latents = shifted(draw(*shape, dtype=dtype), shift).requires_grad_()
        for arguments in loss_arguments(latents):
            yield evaluate(OPS.interaction_losses, arguments, 1)


def inference(dtype: torch.dtype, shift: int) -> Iterable[list[Tensor]]:
    sizes = ((8, 2, 12), (25, 5, 7), (64, 1, 131), (17, 17, 64))
    runs = ([2, 1, 0, 1, 0, 2], [97, 0, 0, 0, 5, 131], [0, 0], [])
    for (width, heads, hidden), lengths, layers, shared in itertools.product(
        sizes, runs, (1, 2), (False, True)
    ):
        shapes = 2 * layers * layer_shapes(width, hidden)
        weights = [
            shifted(draw(*shape, dtype=dtype, seed=i), shift) for i, shape in enumerate(shapes)
        ]
        bounds, rows = cumulative(lengths), sum(lengths)
        index = torch.arange(rows) % 4 if shared else None
        table = shifted(draw(1 + shared, 4 if shared else rows, width, dtype=dtype), shift)
        tail = (bounds[::2].contiguous(), bounds, weights, 2, heads, 1e-5, shared, "cpu")
        yield [encoder_inference(table, index, *tail)]


def pairs(dtype: torch.dtype, shift: int) -> Iterable[list[Tensor]]:
    lengths = ((0, 3), (3, 0), (1, 1), (25, 130), (67, 5))
    for i, ((rows, columns), kinds) in enumerate(itertools.product(lengths, pair_cases.KIND_LISTS)):
        case = pair_cases.PairCase(
            *(rows, columns, (1, 5, 16)[i % 3], (17, 3, 32)[i % 3], kinds),
            reduce=pair_cases.REDUCTIONS[i % 3],
            top_k=1 + i % len(kinds),
            masks=("none", "a", "b", "both")[i % 4],
        )
        inputs = [shifted(x, shift) for x in case.inputs(dtype)]
        yield pair_cases.run(case, inputs, "cpu")
        head = draw(len(kinds), case.width, dtype=dtype)
        yield [pair_map(*inputs[:4], head, backend="cpu", **case.options())]
        top_pairs(*inputs[:4], head, n_pairs=9, backend="cpu", **case.options())


def routing(dtype: torch.dtype, shift: int) -> Iterable[list[Tensor]]:
    for i, (size, load) in enumerate(itertools.product(routed_cases.SIZES, ("even", "dropped"))):
        act = routed_cases.ACTIVATIONS[i % 4]
        case = routed_cases.RoutedCase(
            *(min(size.tokens, 97), size.width, size.hidden, size.experts, size.choices),
            *(act, load, i % 3 > 0),
        )
        for gated in (False, True):
            case = dataclasses.replace(case, gated=gated)
            inputs = [shifted(x, shift) for x in case.inputs(dtype)]
            if gated and case.bias:
                inputs = routed_cases.fused(case, inputs)
            yield routed_cases.run(case, inputs, case.index(), "cpu")
        logits, mask = draw(case.tokens, case.experts, dtype=dtype), torch.rand(case.tokens) < 0.8
        index, weight = gate(logits, case.choices, capacity=3, mask=mask, backend="cpu")
        dispatch(index, case.experts, backend="cpu")
        yield [weight, Twin(5).gate(logits, case.choices, i % 2 == 0)[1]]
    for experts, block in itertools.product((3, 40, 270), (0, 256)):
        index, twin = random_index(300, 2, experts, seed=1), Twin(5, block)
        for capacity in (None, 3):
            twin.dispatch(twin.limit(index, torch.arange(300) % 4 > 0, experts, capacity), experts)


def drive() -> int:
    """Run all kernels in all dtypes; returns the number of calls."""
    count = 0
    torch.set_num_threads(3)
    for dtype, shift in itertools.product(DTYPES, (0, 1)):
        for results in itertools.chain(
            *(group(dtype, shift) for group in (attention, encoder, inference, pairs, routing))
        ):
            count += 1
            assert all(x.isfinite().all() for x in results), f"call {count} in {dtype}"
    for dtype in DTYPES:
        for call in every_operator.calls("cpu", dtype).values():
            for wanted in every_operator.few_subsets(len(call.inputs)):
                every_operator.gradients_of(call, wanted)
                count += 1
    return count


def control(mistake: str) -> None:
    """An access one element past the end of an input, an output or the kernels' scratch memory."""
    if mistake == "scratch":
        for size in (256, 60):  # a shorter buffer does not get the longer one's memory
            address = native.take_scratch(size)
            ctypes.memset(address, 0, size)
            native.return_scratch(address)
        ctypes.memset(native.take_scratch(60) + 60, 0, 4)
    rows, width = 3, 5
    x = torch.zeros(rows * width - (mistake == "read"))
    out = torch.zeros(rows * width - (mistake == "write"))
    zeros = torch.zeros(rows * width)
    cumulative = torch.tensor([0, *range(1, rows + 1)], dtype=torch.int32)
    sizes = (1, 1, rows, rows, width)
    addresses = (each.data_ptr() for each in (x, zeros, cumulative))
    native.pool_forward(0, *addresses, 0, 65536, out.data_ptr(), sizes, 1)


if __name__ == "__main__":
    assert loaded() is native
    if len(sys.argv) > 2:
        control(sys.argv[2])
    else:
        print(native.instruction_set(), POOL, drive())
