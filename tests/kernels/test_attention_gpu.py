"""Attention on a GPU: every configuration that is shipped, every library that is there, bf16."""

from __future__ import annotations

import pytest
import torch

from nanotron_fast.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    explain,
)
from nanotron_fast.kernels.attention import configs as attention_configs
from nanotron_fast.kernels.attention import library as attention_library
from nanotron_fast.kernels.attention import operators as attention_triton
from nanotron_fast.kernels.attention.choice import PREFERENCE
from nanotron_fast.kernels.attention.kernels.dkv import dkv_kernel
from nanotron_fast.kernels.attention.kernels.dq import dq_kernel
from nanotron_fast.kernels.attention.kernels.forward import forward_kernel
from tests.kernels.checks import assert_close, wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Weights are rounded to bf16 before they meet v, and scores' gradients before q and k.
OUT_FACTOR, GRAD_FACTOR = 2, 4
KERNELS = {"FORWARD": forward_kernel, "DQ": dq_kernel, "DKV": dkv_kernel}
# Table -> options of a call that takes it.
TABLES = {
    "": [{}, {"causal": False}],
    "_DOCUMENTS": [{"cu_seqlens": True}],
    "_OPTIONS": [{"window": 100}, {"softcap": 4.0}, {"window": 70, "cu_seqlens": True}],
}
CONFIGURATIONS = [
    pytest.param(
        kernel, table, head_dim, config, id=f"{kernel}{table}-{head_dim}-{config}".replace(" ", "")
    )
    for kernel in KERNELS
    for table in TABLES
    for head_dim, configs in getattr(attention_configs, kernel + table).items()
    for config in configs
]


def make(
    head_dim: int, options: dict, *, seq: int = 333, num_heads: int = 8, num_kv_heads: int = 2
):
    """q, k, v, dout in bf16; the options, with documents in place of True."""
    torch.manual_seed(0)
    lead = (seq,) if "cu_seqlens" in options else (2, seq)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    tensors = [torch.randn(*lead, h, head_dim, device="cuda").bfloat16() for h in heads]
    if "cu_seqlens" in options:
        ends = [0, 1, 1, seq // 3, seq // 2 + 7, seq]
        options = options | {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device="cuda")}
    return tensors, options


def run(function, tensors, options):
    *inputs, dout = tensors
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def check(ours, tensors, options) -> None:
    reference = run(attention_reference, [wide(t) for t in tensors], options)
    for index, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert_close(a, b, factor=GRAD_FACTOR if index else OUT_FACTOR)


@pytest.mark.parametrize(("kernel", "table", "head_dim", "config"), CONFIGURATIONS)
def test_every_configuration(monkeypatch, kernel, table, head_dim, config) -> None:
    is_hopper = torch.cuda.get_device_capability() >= (9, 0)
    if config.kwargs["TMA"] and not is_hopper:
        pytest.skip("the bulk copy engine needs sm_90")
    for name, other in KERNELS.items():
        # The one under test; of the others the first that this GPU can run, without timing.
        choices = getattr(attention_configs, name + table)[head_dim]
        first = next(c for c in choices if is_hopper or not c.kwargs["TMA"])
        chosen = config if name == kernel else first
        monkeypatch.setattr(other, "cache", {})
        monkeypatch.setattr(attention_triton, "_prepared", {})
        monkeypatch.setattr(other, "early_config_prune", lambda *_, _chosen=chosen, **__: [_chosen])
    for options in TABLES[table]:
        tensors, options = make(head_dim, options)
        check(run(attention, tensors, options | {"backend": "triton"}), tensors, options)


@pytest.mark.parametrize("head_dim", [16, 24, 80, 96, 112, 160, 192, 200, 248])
def test_padded_head_dims(head_dim) -> None:
    for options in ({}, {"cu_seqlens": True, "window": 50}):
        tensors, options = make(head_dim, options)
        check(run(attention, tensors, options | {"backend": "triton"}), tensors, options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"cu_seqlens": True}], ids=str)
def test_fp32(options) -> None:
    tensors, options = make(64, options, seq=150)
    tensors = [t.float() for t in tensors]
    check(run(attention, tensors, options | {"backend": "triton"}), tensors, options)


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"cu_seqlens": True}, {"window": 64}, {"softcap": 4.0}],
    ids=str,
)
def test_every_library(name, options, head_dim, num_kv_heads) -> None:
    wanted = {
        "causal": options.get("causal", True),
        "has_documents": "cu_seqlens" in options,
        "has_window": "window" in options,
        "has_softcap": "softcap" in options,
        "head_dim": head_dim,
        "backend": name,
    }
    try:
        explain("cuda", **wanted)
    except ValueError as error:
        pytest.skip(str(error))
    tensors, options = make(head_dim, options, num_kv_heads=num_kv_heads)
    longest = {"max_seqlen": 333 - 333 // 3} if "cu_seqlens" in options else {}
    check(run(attention, tensors, options | longest | {"backend": name}), tensors, options)
    try:
        explain("cuda", **wanted, wants_lse=True)
    except ValueError:
        return
    q, k, v, dout = tensors
    out, lse = attention_forward(q, k, v, **options, **longest, backend=name)
    assert lse.dtype == torch.float32
    grads = attention_backward(dout, q, k, v, out, lse, **options, **longest, backend=name)
    check([out, *grads], tensors, options)
    # What one gave another can take back.
    grads = attention_backward(dout, q, k, v, out, lse, **options, backend="triton")
    check([out, *grads], tensors, options)


def test_a_packed_tensor_on_every_library() -> None:
    torch.manual_seed(0)
    packed = torch.randn(2, 300, 12 * 128, device="cuda").bfloat16().requires_grad_()
    q, k, v = packed.view(2, 300, 12, 128).split([8, 2, 2], 2)
    dout = torch.randn(2, 300, 8, 128, device="cuda").bfloat16()
    expected = attention_reference(*(wide(t) for t in (q, k, v)))
    for name in PREFERENCE:
        if name == "torch" or attention_library.missing(name):
            continue
        try:
            out = attention(q, k, v, backend=name)
        except ValueError:  # not for this GPU
            continue
        assert_close(out, expected, factor=OUT_FACTOR)
        (grad,) = torch.autograd.grad(out, packed, dout)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": True}, {"window": 512}], ids=str)
def test_four_thousand_rows(options) -> None:
    tensors, options = make(128, options, seq=4099, num_heads=4, num_kv_heads=1)
    check(run(attention, tensors, options | {"backend": "triton"}), tensors, options)


def test_compiled_by_inductor() -> None:
    tensors, options = make(128, {"cu_seqlens": True})
    compiled = torch.compile(attention, fullgraph=True)
    check(run(compiled, tensors, options | {"backend": "triton"}), tensors, options)
    check(run(compiled, tensors, options), tensors, options)
