"""What Nanotron's classes call the modules of a decoder, and how they pack q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.families import Family


@dataclass(frozen=True, slots=True)
class Names:
    """Of the modules whose parameters a family's table has.

    Args:
        embedding: of the model.
        norms: of a layer, before attention and before the MLP.
        output_norms: of a layer, after attention and after the MLP.
        qkv, output: of attention.
        mlp: of a layer.
        up, down: of a dense MLP; up is gate and up of a gated one.
        packs_by_kv_head: the rows of qkv are, for each key-value head, its queries, its key, its
            value; else all queries, all keys, all values.
    """

    embedding: str = "token_position_embeddings"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    output_norms: tuple[str, str] = ("attn_output_layernorm", "mlp_output_layernorm")
    qkv: str = "qkv_proj"
    output: str = "o_proj"
    mlp: str = "mlp"
    up: str = "gate_up_proj"
    down: str = "down_proj"
    packs_by_kv_head: bool = False


# Source: nanotron/models at 2411b022, llama.py with qwen.py, and starcoder2.py.
LLAMA = Names()
STARCODER2 = Names(
    embedding="token_embeddings",
    norms=("ln_1", "ln_2"),
    qkv="query_key_value",
    output="dense",
    mlp="ff",
    up="c_fc",
    down="c_proj",
    packs_by_kv_head=True,
)


def embedding_of(family: Family) -> str:
    """The name of the embedding's parameter. Raises UnsupportedModelError where there is none."""
    for rule in family.rules:
        if rule.block == "embedding":
            return rule.param
    raise UnsupportedModelError(f"{family.name}: its table of parameters has no embedding")


def names_of(family: Family) -> Names:
    """Those that a family's table goes by. Raises UnsupportedModelError where they are others."""
    embedding = embedding_of(family)
    for names in (LLAMA, STARCODER2):
        if embedding == f"model.{names.embedding}.pp_block.token_embedding.weight":
            return names
    raise UnsupportedModelError(
        f"{family.name}: its embedding is {embedding}, a name that none of Nanotron's models has"
    )
