# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's GroupQueryAttention, whose cache is bound once and updated in place.

The operator appends the newest token to the cache it attends to, so it gets the last key and
value of each context again at every call. Its cache is `[B, K, S, H]`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from cases import Case, Inputs
from device import Device, Runner


def unsupported(case: Case) -> str | None:
    """Why the operator cannot do the case on CPU, None if it can."""
    if case.page_size is not None:
        return "no pages"
    if case.quantized or case.dtype == "bfloat16":
        return "float32 and float16 only on CPU"
    if case.sinks:
        return "sinks are not set up"
    return "one query token only" if case.query_len > 1 else None


def prepare(case: Case, device: Device, sets: Sequence[Inputs]) -> Runner:
    """Builds a model of one node and binds each input set."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.num_cores
    session = onnxruntime.InferenceSession(
        _model(case), options, providers=["CPUExecutionProvider"]
    )
    bindings = [_bind(session, case, x) for x in sets]
    calls = [functools.partial(_run, session, binding, case) for binding in bindings]
    return Runner(calls, lambda out: None)


def output(out: Any) -> np.ndarray:
    """Float32 `[B, T, N, H]`."""
    binding, shape = out
    return binding.get_outputs()[0].numpy().reshape(shape).astype(np.float32)


def _run(session: Any, binding: Any, case: Case) -> Any:
    session.run_with_iobinding(binding)
    return binding, (case.batch, case.query_len, case.num_q_heads, case.head_dim)


def _bind(session: Any, case: Case, x: Inputs) -> Any:
    import onnxruntime

    key, value = (np.array(np.swapaxes(np.asarray(a), 1, 2), order="C") for a in (x.key, x.value))
    last = case.context - 1
    rows = (case.batch, 1, -1)
    arrays = {
        "query": np.asarray(x.query).reshape(rows),
        "key": key[:, :, last].reshape(rows),
        "value": value[:, :, last].reshape(rows),
        "past_key": key,
        "past_value": value,
        "seqlens_k": np.full((case.batch,), last, np.int32),
        "total_sequence_length": np.asarray(case.context, np.int32),
    }
    bound = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items()}
    binding = session.io_binding()
    for name, array in bound.items():
        binding.bind_ortvalue_input(name, array)
    out = np.zeros(arrays["query"].shape, arrays["query"].dtype)
    binding.bind_ortvalue_output("out", onnxruntime.OrtValue.ortvalue_from_numpy(out))
    binding.bind_ortvalue_output("present_key", bound["past_key"])
    binding.bind_ortvalue_output("present_value", bound["past_value"])
    return binding


def _model(case: Case) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    dtype = TensorProto.FLOAT if case.dtype == "float32" else TensorProto.FLOAT16
    b, k, h = case.batch, case.num_kv_heads, case.head_dim
    cache = (b, k, case.kv_len, h)
    inputs = {
        "query": (dtype, (b, 1, case.num_q_heads * h)),
        "key": (dtype, (b, 1, k * h)),
        "value": (dtype, (b, 1, k * h)),
        "past_key": (dtype, cache),
        "past_value": (dtype, cache),
        "seqlens_k": (TensorProto.INT32, (b,)),
        "total_sequence_length": (TensorProto.INT32, ()),
    }
    outputs = {
        "out": inputs["query"],
        "present_key": (dtype, cache),
        "present_value": (dtype, cache),
    }
    attributes: dict[str, Any] = {"num_heads": case.num_q_heads, "kv_num_heads": k}
    if case.sliding_window is not None:
        attributes["local_window_size"] = case.sliding_window
    if case.logits_soft_cap is not None:
        attributes["softcap"] = case.logits_soft_cap
    node = helper.make_node(
        "GroupQueryAttention",
        list(inputs),
        list(outputs),
        domain="com.microsoft",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "decode",
        [helper.make_tensor_value_info(n, *spec) for n, spec in inputs.items()],
        [helper.make_tensor_value_info(n, *spec) for n, spec in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()
