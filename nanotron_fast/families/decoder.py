"""What the tables of most families share: a Llama's tensors, and transformers' defaults."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from nanotron_fast.families.rules import Copy, Fuse, Rows, Rule

# A layer's norms in our class, by what most of Hugging Face's classes call them.
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "attn_output_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_output_layernorm",
}
LAYER = "model.layers.{layer}."
BLOCK = "model.decoder.{layer}.pp_block."
EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
HEADS = (("heads", "head_dim"), ("kv_heads", "head_dim"), ("kv_heads", "head_dim"))
# A rotary embedding turns q and k.
ROTARY = (("rotary_first", "rotary_end"), ("rotary_first", "rotary_end"), None)


def qkv(kind: str) -> tuple[str, str, str]:
    """The three projections' weights or biases in Hugging Face."""
    return (
        f"{LAYER}self_attn.q_proj.{kind}",
        f"{LAYER}self_attn.k_proj.{kind}",
        f"{LAYER}self_attn.v_proj.{kind}",
    )


def embeddings(param: str) -> tuple[Rule, ...]:
    """The embedding, and the head where it is a matrix of its own."""
    matrix = partial(Copy, rows="vocab", columns="hidden", split="rows")
    tensor, head = "model.embed_tokens.weight", "lm_head.weight"
    return (
        matrix(tensor, param, block="embedding", when="untied"),
        # A tied file may have kept the matrix under the head's name alone.
        matrix(tensor, param, block="embedding", when="tied", alias=head),
        matrix(head, "model.lm_head.pp_block.weight", block="head", when="untied"),
    )


EMBEDDINGS: tuple[Rule, ...] = (
    *embeddings(EMBEDDING),
    Copy(
        "model.norm.weight",
        "model.final_layer_norm.pp_block.weight",
        rows="hidden",
        block="norm",
    ),
)

OUTPUT: tuple[Rule, ...] = (
    Copy(
        f"{LAYER}self_attn.o_proj.weight",
        f"{BLOCK}attn.o_proj.weight",
        rows="hidden",
        columns=("heads", "head_dim"),
        split="columns",
    ),
    Copy(
        f"{LAYER}self_attn.o_proj.bias",
        f"{BLOCK}attn.o_proj.bias",
        rows="hidden",
        when="output_bias",
    ),
)

PROJECTIONS: tuple[Rule, ...] = (
    Fuse(
        qkv("weight"),
        f"{BLOCK}attn.qkv_proj.weight",
        rows=HEADS,
        columns="hidden",
        rotary=ROTARY,
    ),
    Fuse(
        qkv("bias"),
        f"{BLOCK}attn.qkv_proj.bias",
        rows=HEADS,
        rotary=ROTARY,
        when="qkv_bias",
    ),
    *OUTPUT,
)

ATTENTION: tuple[Rule, ...] = (
    Copy(f"{LAYER}input_layernorm.weight", f"{BLOCK}input_layernorm.weight", rows="hidden"),
    *PROJECTIONS,
    Copy(
        f"{LAYER}post_attention_layernorm.weight",
        f"{BLOCK}post_attention_layernorm.weight",
        rows="hidden",
    ),
)


def qk_norm(*, whole: bool = False) -> tuple[Rule, ...]:
    """The norms of queries and keys: of each head by itself, or of all heads' rows at once."""
    rows: tuple[Rows, Rows] = ("head_dim", "head_dim")
    if whole:
        rows = ("heads", "head_dim"), ("kv_heads", "head_dim")
    return tuple(
        Copy(
            f"{LAYER}self_attn.{letter}_norm.weight",
            f"{BLOCK}attn.{letter}_norm.weight",
            rows=count,
            split="rows" if whole else None,
            when="qk_norm",
        )
        for letter, count in zip("qk", rows, strict=True)
    )


def norms(
    *places: str, hf: Mapping[str, str] = MappingProxyType({}), kind: str = "weight"
) -> tuple[Rule, ...]:
    """A layer's norms: some of _NORMS, under other names in Hugging Face where `hf` has them."""
    return tuple(
        Copy(
            f"{LAYER}{hf.get(place, place)}.{kind}", f"{BLOCK}{_NORMS[place]}.{kind}", rows="hidden"
        )
        for place in places
    )


def layer_norm(hf: str, param: str, block: str = "layer") -> tuple[Rule, ...]:
    """A LayerNorm's weight and bias, by the names of the norm on both sides."""
    return tuple(
        Copy(f"{hf}.{kind}", f"{param}.{kind}", rows="hidden", block=block)
        for kind in ("weight", "bias")
    )


def mlp(
    hf: str,
    param: str,
    rows: str,
    layers: str = "all",
    when: str | None = None,
    *,
    is_fused: bool = False,
) -> tuple[Rule, ...]:
    """A gated MLP: gate and up in one parameter, and the way down.

    `is_fused`: gate and up are one tensor in Hugging Face as well.
    """
    apart = (f"{LAYER}{hf}.gate_proj.weight", f"{LAYER}{hf}.up_proj.weight")
    return (
        Fuse(
            f"{LAYER}{hf}.gate_up_proj.weight" if is_fused else apart,
            f"{BLOCK}{param}.gate_up_proj.weight",
            rows=(rows, rows),
            columns="hidden",
            layers=layers,
            when=when,
        ),
        Copy(
            f"{LAYER}{hf}.down_proj.weight",
            f"{BLOCK}{param}.down_proj.weight",
            rows="hidden",
            columns=rows,
            split="columns",
            layers=layers,
            when=when,
        ),
    )


MLP_BIASES: tuple[Rule, ...] = (
    Fuse(
        (f"{LAYER}mlp.gate_proj.bias", f"{LAYER}mlp.up_proj.bias"),
        f"{BLOCK}mlp.gate_up_proj.bias",
        rows=("intermediate", "intermediate"),
        layers="dense",
        when="mlp_bias",
    ),
    Copy(
        f"{LAYER}mlp.down_proj.bias",
        f"{BLOCK}mlp.down_proj.bias",
        rows="hidden",
        layers="dense",
        when="mlp_bias",
    ),
)


def plain_mlp() -> tuple[Rule, ...]:
    """An MLP without a gate: up and down, with biases where there are some."""
    up, down = f"{LAYER}mlp.up_proj", f"{LAYER}mlp.down_proj"
    # The module has the name of a gated one's.
    up_param, down_param = f"{BLOCK}mlp.gate_up_proj", f"{BLOCK}mlp.down_proj"
    matrix, bias = partial(Copy, layers="dense"), partial(Copy, layers="dense", when="mlp_bias")
    rows, columns = "intermediate", "hidden"
    return (
        matrix(f"{up}.weight", f"{up_param}.weight", rows=rows, columns=columns, split="rows"),
        bias(f"{up}.bias", f"{up_param}.bias", rows=rows, split="rows"),
        matrix(
            f"{down}.weight", f"{down_param}.weight", rows=columns, columns=rows, split="columns"
        ),
        bias(f"{down}.bias", f"{down_param}.bias", rows=columns),
    )


DENSE: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *ATTENTION,
    *mlp("mlp", "mlp", "intermediate"),
    *MLP_BIASES,
)

# Class defaults of transformers 4.57 and 5.x; a config leaves out what equals them.
DEFAULTS = {
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "use_cache": True,
}
