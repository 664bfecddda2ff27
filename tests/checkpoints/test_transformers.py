"""transformers loads what we write, and computes what it computed with the source."""

import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.families import BUILT_IN
from tests.modelzoo import FAMILIES, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "qwen2_moe-window": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 6,
        },
    ),
    "qwen2_moe-some-dense": ("qwen2_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 2}),
    "starcoder2-window": ("starcoder2", {"sliding_window": 8}),
}


def load(root: Path) -> Any:
    """The model in fp32. A tensor that is missing, or that nobody asked for, fails the test."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        root, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (problem, info[problem])
    return model.eval()


@torch.no_grad()
def logits(root: Path, ids: Any) -> Any:
    return load(root)(ids).logits


@pytest.mark.parametrize("has_side_file", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_as_the_source(name: str, has_side_file: bool, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    source = make(family, **changes).save(tmp_path / "source")
    nanotron_fast.convert(source, tmp_path / "there", topology=Topology(tp=2, pp=2))
    if not has_side_file:
        (tmp_path / "there" / "nanotron_fast.json").unlink()
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back", max_shard_size="100KB")
    ids = torch.randint(0, 160, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(tmp_path / "back", ids), logits(source, ids))
    if has_side_file:
        assert comparable(tmp_path / "back") == comparable(source)


def comparable(root: Path) -> dict[str, Any]:
    """Every field of the config that transformers makes of a folder."""
    config = transformers.AutoConfig.from_pretrained(root).to_dict()
    config.pop("_name_or_path", None)
    return dict(config)


@pytest.mark.parametrize("case", sorted(path.parent.name for path in GOLDEN.glob("*/hf")))
def test_golden_logits(case: str, tmp_path: Path) -> None:
    reference = json.loads((GOLDEN / case / "reference_logits.json").read_text())
    nanotron_fast.convert(GOLDEN / case / "hf", tmp_path / "there", topology=Topology(tp=2))
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    found = logits(tmp_path / "back", torch.tensor(reference["input_ids"]))
    expected = torch.tensor(reference["logits_fp32_compute_last4"])
    torch.testing.assert_close(found[:, -4:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_checkpoint_that_transformers_saved(is_stacked: bool, tmp_path: Path) -> None:
    """Written by this version's own save_pretrained, converted, and loaded again."""
    if is_stacked and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 reads no stacked experts")
    source = make("qwen2_moe").save(tmp_path / "source", is_stacked=is_stacked)
    model = load(source)
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    nanotron_fast.convert(tmp_path / "saved", tmp_path / "there", topology=Topology(tp=2))
    nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(logits(tmp_path / "back", ids), logits(source, ids))


@pytest.mark.parametrize("family", BUILT_IN, ids=lambda family: family.name)
def test_defaults_are_those_of_the_class(family: Any) -> None:
    """What config.json leaves out has the value that transformers' class would give it."""
    if family.name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no class of {family.name}")
    config = transformers.AutoConfig.for_model(family.name)
    rope = getattr(config, "rope_parameters", None) or {}
    values = {**config.to_dict(), **rope.get("full_attention", rope)}
    values |= {name: values[new] for new, name in family.renamed.items() if new in values}
    if "use_sliding_window" in values:
        in_use = transformers.AutoConfig.for_model(family.name, use_sliding_window=True)
        values["sliding_window"] = in_use.sliding_window
    # Keys that some families have and others share a table with.
    absent = {
        *("pretraining_tp", "max_window_layers", "rms_norm_eps", "head_dim"),
        # transformers 5 has layer_types and rope_parameters in their place.
        *("sliding_window_pattern", "rope_local_base_freq"),
        # transformers 4 has these in its code.
        *("swiglu_alpha", "swiglu_limit"),
    } - values.keys()
    if family.name == "olmo3":  # Its base is another in each version, and must be said.
        absent |= {"rope_theta"}
    if family.name == "gpt_oss":  # Another in each version, and of no part in what is computed.
        absent |= {"router_aux_loss_coef"}
    for key in family.defaults.keys() - absent:
        expected = family.defaults[key]
        if key == "num_key_value_heads" and expected is None:  # as many as there are heads
            expected = config.num_attention_heads
        assert values[key] == expected, key


def test_training_checkpoint_loads(tmp_path: Path) -> None:
    nanotron_fast.convert(GOLDEN / "training" / "llama_tied_tp2_zero0", tmp_path / "hf")
    assert torch.isfinite(logits(tmp_path / "hf", torch.arange(16).reshape(1, 16))).all()
