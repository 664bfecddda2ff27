"""Starcoder2: LayerNorms, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from nanotron_fast.families.decoder import BLOCK, DEFAULTS, LAYER, embeddings, layer_norm, qkv
from nanotron_fast.families.family import Family
from nanotron_fast.families.rules import Copy, FuseByKvHead, Rule
from nanotron_fast.families.windows import PLAIN
from nanotron_fast.formats.nanotron.classes import STARCODER2_CONFIG

RULES: tuple[Rule, ...] = (
    *embeddings("model.token_embeddings.pp_block.token_embedding.weight"),
    *layer_norm(f"{LAYER}input_layernorm", f"{BLOCK}ln_1"),
    FuseByKvHead(qkv("weight"), f"{BLOCK}attn.query_key_value.weight", columns="hidden"),
    FuseByKvHead(qkv("bias"), f"{BLOCK}attn.query_key_value.bias", when="qkv_bias"),
    Copy(
        f"{LAYER}self_attn.o_proj.weight",
        f"{BLOCK}attn.dense.weight",
        rows="hidden",
        columns=("heads", "head_dim"),
        split="columns",
    ),
    Copy(
        f"{LAYER}self_attn.o_proj.bias",
        f"{BLOCK}attn.dense.bias",
        rows="hidden",
        when="output_bias",
    ),
    *layer_norm(f"{LAYER}post_attention_layernorm", f"{BLOCK}ln_2"),
    Copy(
        f"{LAYER}mlp.c_fc.weight",
        f"{BLOCK}ff.c_fc.weight",
        rows="intermediate",
        columns="hidden",
        split="rows",
    ),
    Copy(
        f"{LAYER}mlp.c_fc.bias",
        f"{BLOCK}ff.c_fc.bias",
        rows="intermediate",
        split="rows",
        when="mlp_bias",
    ),
    Copy(
        f"{LAYER}mlp.c_proj.weight",
        f"{BLOCK}ff.c_proj.weight",
        rows="hidden",
        columns="intermediate",
        split="columns",
    ),
    Copy(f"{LAYER}mlp.c_proj.bias", f"{BLOCK}ff.c_proj.bias", rows="hidden", when="mlp_bias"),
    *layer_norm("model.norm", "model.final_layer_norm.pp_block", block="norm"),
)


FAMILY = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    model_class=STARCODER2_CONFIG,
    rules=RULES,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "sliding_window": None,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "max_position_embeddings": 4096,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    keys={"norm_eps": "norm_epsilon"},
    qkv_bias="use_bias",
    output_bias="use_bias",
    mlp_bias="use_bias",
    norm="layer_norm",
    has_gated_mlp=False,
    quirks=(PLAIN,),
    recognises=lambda model_config: True,
    extras=("attention_dropout", "embedding_dropout", "residual_dropout"),
)
