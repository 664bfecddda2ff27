"""The families that are built in."""

from __future__ import annotations

from nanotron_fast.families.family import Family
from nanotron_fast.families.rules import Copy, Fuse, FuseByKvHead, Rule, StackExperts
from nanotron_fast.formats.nanotron.classes import LLAMA_CONFIG, QWEN2_CONFIG, STARCODER2_CONFIG

_LAYER = "model.layers.{layer}."
_BLOCK = "model.decoder.{layer}.pp_block."
_EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
_HEADS = (("heads", "head_dim"), ("kv_heads", "head_dim"), ("kv_heads", "head_dim"))
_ROTARY = (True, True, False)


def _qkv(kind: str) -> tuple[str, str, str]:
    return (
        f"{_LAYER}self_attn.q_proj.{kind}",
        f"{_LAYER}self_attn.k_proj.{kind}",
        f"{_LAYER}self_attn.v_proj.{kind}",
    )


_EMBEDDINGS: tuple[Rule, ...] = (
    Copy(
        "model.embed_tokens.weight",
        _EMBEDDING,
        rows="vocab",
        columns="hidden",
        split="rows",
        block="embedding",
        when="untied",
    ),
    # A tied file may have kept the matrix under the head's name alone.
    Copy(
        "model.embed_tokens.weight",
        _EMBEDDING,
        rows="vocab",
        columns="hidden",
        split="rows",
        block="embedding",
        when="tied",
        alias="lm_head.weight",
    ),
    Copy(
        "model.norm.weight",
        "model.final_layer_norm.pp_block.weight",
        rows="hidden",
        block="norm",
    ),
    Copy(
        "lm_head.weight",
        "model.lm_head.pp_block.weight",
        rows="vocab",
        columns="hidden",
        split="rows",
        block="head",
        when="untied",
    ),
)

_ATTENTION: tuple[Rule, ...] = (
    Copy(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}input_layernorm.weight", rows="hidden"),
    Fuse(
        _qkv("weight"),
        f"{_BLOCK}attn.qkv_proj.weight",
        rows=_HEADS,
        columns="hidden",
        rotary=_ROTARY,
    ),
    Fuse(
        _qkv("bias"),
        f"{_BLOCK}attn.qkv_proj.bias",
        rows=_HEADS,
        rotary=_ROTARY,
        when="qkv_bias",
    ),
    Copy(
        f"{_LAYER}self_attn.o_proj.weight",
        f"{_BLOCK}attn.o_proj.weight",
        rows="hidden",
        columns=("heads", "head_dim"),
        split="columns",
    ),
    Copy(
        f"{_LAYER}self_attn.o_proj.bias",
        f"{_BLOCK}attn.o_proj.bias",
        rows="hidden",
        when="output_bias",
    ),
    Copy(
        f"{_LAYER}post_attention_layernorm.weight",
        f"{_BLOCK}post_attention_layernorm.weight",
        rows="hidden",
    ),
)


def _mlp(
    hf: str, param: str, rows: str, layers: str = "all", when: str | None = None
) -> tuple[Rule, ...]:
    return (
        Fuse(
            (f"{_LAYER}{hf}.gate_proj.weight", f"{_LAYER}{hf}.up_proj.weight"),
            f"{_BLOCK}{param}.gate_up_proj.weight",
            rows=(rows, rows),
            columns="hidden",
            layers=layers,
            when=when,
        ),
        Copy(
            f"{_LAYER}{hf}.down_proj.weight",
            f"{_BLOCK}{param}.down_proj.weight",
            rows="hidden",
            columns=rows,
            split="columns",
            layers=layers,
            when=when,
        ),
    )


_DENSE: tuple[Rule, ...] = (*_EMBEDDINGS, *_ATTENTION, *_mlp("mlp", "mlp", "intermediate"))

_SPARSE: tuple[Rule, ...] = (
    *_EMBEDDINGS,
    *_ATTENTION,
    *_mlp("mlp", "mlp", "intermediate", layers="dense"),
    Copy(
        f"{_LAYER}mlp.gate.weight",
        f"{_BLOCK}mlp.router.weight",
        rows="experts",
        columns="hidden",
        layers="moe",
        is_fp32=True,
    ),
    StackExperts(
        (
            f"{_LAYER}mlp.experts.{{expert}}.gate_proj.weight",
            f"{_LAYER}mlp.experts.{{expert}}.up_proj.weight",
        ),
        f"{_LAYER}mlp.experts.gate_up_proj",
        f"{_BLOCK}mlp.experts.merged_gate_up_proj",
        rows="moe_intermediate",
        columns="hidden",
    ),
    StackExperts(
        (f"{_LAYER}mlp.experts.{{expert}}.down_proj.weight",),
        f"{_LAYER}mlp.experts.down_proj",
        f"{_BLOCK}mlp.experts.merged_down_proj",
        rows="hidden",
        columns="moe_intermediate",
    ),
    *_mlp(
        "mlp.shared_expert",
        "mlp.shared_expert",
        "shared_intermediate",
        layers="moe",
        when="shared_expert",
    ),
    Copy(
        f"{_LAYER}mlp.shared_expert_gate.weight",
        f"{_BLOCK}mlp.shared_expert_gate.weight",
        rows="one",
        columns="hidden",
        layers="moe",
        when="shared_expert",
    ),
)


def _norm(hf: str, param: str, block: str = "layer") -> tuple[Rule, ...]:
    return tuple(
        Copy(f"{hf}.{kind}", f"{param}.{kind}", rows="hidden", block=block)
        for kind in ("weight", "bias")
    )


_STARCODER2: tuple[Rule, ...] = (
    Copy(
        "model.embed_tokens.weight",
        "model.token_embeddings.pp_block.token_embedding.weight",
        rows="vocab",
        columns="hidden",
        split="rows",
        block="embedding",
        alias="lm_head.weight",
    ),
    *_norm(f"{_LAYER}input_layernorm", f"{_BLOCK}ln_1"),
    FuseByKvHead(_qkv("weight"), f"{_BLOCK}attn.query_key_value.weight", columns="hidden"),
    FuseByKvHead(_qkv("bias"), f"{_BLOCK}attn.query_key_value.bias"),
    Copy(
        f"{_LAYER}self_attn.o_proj.weight",
        f"{_BLOCK}attn.dense.weight",
        rows="hidden",
        columns=("heads", "head_dim"),
        split="columns",
    ),
    Copy(f"{_LAYER}self_attn.o_proj.bias", f"{_BLOCK}attn.dense.bias", rows="hidden"),
    *_norm(f"{_LAYER}post_attention_layernorm", f"{_BLOCK}ln_2"),
    Copy(
        f"{_LAYER}mlp.c_fc.weight",
        f"{_BLOCK}ff.c_fc.weight",
        rows="intermediate",
        columns="hidden",
        split="rows",
    ),
    Copy(f"{_LAYER}mlp.c_fc.bias", f"{_BLOCK}ff.c_fc.bias", rows="intermediate", split="rows"),
    Copy(
        f"{_LAYER}mlp.c_proj.weight",
        f"{_BLOCK}ff.c_proj.weight",
        rows="hidden",
        columns="intermediate",
        split="columns",
    ),
    Copy(f"{_LAYER}mlp.c_proj.bias", f"{_BLOCK}ff.c_proj.bias", rows="hidden"),
    *_norm("model.norm", "model.final_layer_norm.pp_block", block="norm"),
)

# Class defaults of transformers 4.57 and 5.x; a config leaves out what equals them.
_LLAMA_DEFAULTS = {
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
_QWEN2_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    # The class hides it unless use_sliding_window is true.
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_class=LLAMA_CONFIG,
    other_classes=(QWEN2_CONFIG,),
    rules=_DENSE,
    defaults={
        **_LLAMA_DEFAULTS,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    has_extended_target=True,
    extras=("pretraining_tp",),
)

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_class=LLAMA_CONFIG,
    window_class=QWEN2_CONFIG,
    other_classes=(QWEN2_CONFIG,),
    rules=_DENSE,
    defaults={
        **_LLAMA_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    window="plain",
)

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_class=QWEN2_CONFIG,
    rules=_DENSE,
    defaults=_QWEN2_DEFAULTS,
    qkv_bias=True,
    window="qwen",
)

SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    model_class=QWEN2_CONFIG,
    rules=_DENSE,
    defaults={
        **_QWEN2_DEFAULTS,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "rope_theta": 2000000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "pretraining_tp": 1,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    window="qwen",
    has_no_rope_layers=True,
    extras=("pretraining_tp",),
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    model_class=QWEN2_CONFIG,
    rules=_SPARSE,
    defaults={
        **_QWEN2_DEFAULTS,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    qkv_bias="qkv_bias",
    window="qwen",
    is_moe=True,
)

STARCODER2 = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    model_class=STARCODER2_CONFIG,
    rules=_STARCODER2,
    defaults={
        **_LLAMA_DEFAULTS,
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
    window="plain",
    is_always_tied=True,
    extras=("attention_dropout", "embedding_dropout", "residual_dropout"),
)

BUILT_IN = (LLAMA, MISTRAL, QWEN2, SMOLLM3, QWEN2_MOE, STARCODER2)
