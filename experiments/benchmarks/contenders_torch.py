"""The contenders in PyTorch: its fused kernel, plain operations, compiled FlexAttention."""

import math
import os
import shutil
from typing import Any

import numpy as np
from einops import rearrange

import jattn
from experiments.benchmarks.cases import CAP, Case, allowed, documents, lengths
from experiments.benchmarks.contenders import LeftOut, alibi_bias, operands
from experiments.benchmarks.timing import Run


def run_torch(case: Case) -> Run:
    """`scaled_dot_product_attention`, with a dense mask if the case needs one.

    Additive attention uses plain operations.
    """
    torch = _torch()
    if case.kind == "soft cap":
        raise LeftOut("scaled_dot_product_attention has no soft cap")
    if case.kind == "additive" and case.too_large:
        raise LeftOut("it would hold too many scores")
    inputs, cotangent = _tensors(case)
    options = {} if case.kind == "additive" else _options(case)
    attend = (
        _additive if case.kind == "additive" else torch.nn.functional.scaled_dot_product_attention
    )

    def run() -> Any:
        output = attend(*inputs, **options)
        return (output, torch.autograd.grad(output, inputs, cotangent)) if case.backward else output

    run()
    return run


def _options(case: Case) -> dict[str, Any]:
    import torch

    options: dict[str, Any] = {"enable_gqa": case.N != case.K}
    if case.kind == "causal":
        options["is_causal"] = True
    elif case.kind == "ALiBi":
        options["attn_mask"] = torch.from_numpy(
            np.where(allowed(case), alibi_bias(case)[None], -math.inf)
        )
    elif case.kind != "full":
        options["attn_mask"] = torch.from_numpy(allowed(case))
    return options


def _additive(query: Any, key: Any, value: Any, weight: Any) -> Any:
    import torch

    scores = torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ weight
    return torch.softmax(scores, dim=-1) @ value


def run_flex(case: Case) -> Run:
    """FlexAttention with torch.compile, forward only: it has no backward pass on CPU."""
    torch = _torch()
    if case.backward:
        raise LeftOut("it has no backward pass on CPU")
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise LeftOut(f"torch.compile needs a C++ compiler, and {compiler} is not installed")
    from torch.nn.attention import flex_attention as flex

    torch._dynamo.reset()  # else the second shape compiles for all shapes
    mask, change = _mods(case)
    batch = case.B if case.kind == "padding" else None
    blocks = (
        flex.create_block_mask(mask, batch, None, case.T, case.T, device="cpu") if mask else None
    )
    (query, key, value), _ = _tensors(case)
    attend, shared = torch.compile(flex.flex_attention, dynamic=False), case.N != case.K

    def run() -> Any:
        return attend(query, key, value, score_mod=change, block_mask=blocks, enable_gqa=shared)

    try:
        run()
    except Exception as error:  # the compiler raises errors of many kinds
        raise LeftOut(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
    return run


def _mods(case: Case) -> tuple[Any, Any]:
    """FlexAttention's mask_mod and score_mod."""
    import torch

    def causal(b: Any, h: Any, q_idx: Any, k_idx: Any) -> Any:
        return q_idx >= k_idx

    match case.kind:
        case "causal":
            return causal, None
        case "window":
            return (
                lambda b, h, q_idx, k_idx: (q_idx >= k_idx) & (q_idx - k_idx <= case.window),
                None,
            )
        case "soft cap":
            return causal, lambda score, b, h, q_idx, k_idx: CAP * torch.tanh(score / CAP)
        case "ALiBi":
            slopes = torch.from_numpy(jattn.modifiers.alibi_slopes(case.N))
            return (
                causal,
                lambda score, b, h, q_idx, k_idx: score - slopes[h] * (q_idx - k_idx).abs(),
            )
        case "documents":
            ids = torch.from_numpy(documents(case))
            return lambda b, h, q_idx, k_idx: (q_idx >= k_idx) & (ids[q_idx] == ids[k_idx]), None
        case "padding":
            real = torch.from_numpy(lengths(case))
            return lambda b, h, q_idx, k_idx: k_idx < real[b], None
    return None, None


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise LeftOut("PyTorch is not installed") from None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def _tensors(case: Case) -> tuple[list[Any], Any]:
    """The operands, contiguous in PyTorch's own layout: heads before length."""
    import torch

    def tensor(array: np.ndarray) -> Any:
        array = rearrange(array, "b t n h -> b n t h").copy() if array.ndim == 4 else array
        return torch.from_numpy(array).to(getattr(torch, case.dtype))

    inputs, cotangent = operands(case)
    return [tensor(array).requires_grad_(case.backward) for array in inputs], tensor(cotangent)
