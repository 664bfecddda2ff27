"""Garbage in the JSON files of a checkpoint: an error of ours, never a TypeError from within."""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nanotron_fast
from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.formats.huggingface import checkpoint as huggingface
from nanotron_fast.formats.nanotron import checkpoint as nanotron
from nanotron_fast.formats.safetensors import read_header
from tests.modelzoo import FAMILIES, make

NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    2**70,
    -(2**70),
    0.0,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "64",
    "\ud800",
    "a\0b",
    [],
    [0],
    [-1],
    [2**70],
    [None],
    ["a"],
    [[]],
    [{}],
    {},
    {"a": 1},
    {"type": []},
    {"rope_type": {}},
    {"rope_type": "default", "rope_theta": "x"},
    {"rope_type": "linear", "factor": [], "rope_theta": 1e4},
    {"num_experts": 0},
]
JSON = st.recursive(
    st.sampled_from(NASTY) | st.integers(-4, 70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))

HF_KEYS = {
    "layer_types",
    "no_rope_layers",
    "rope_parameters",
    "partial_rotary_factor",
    "head_dim",
    "quantization_config",
    "model_type",
    "architectures",
    "torch_dtype",
}
MODEL_CONFIG_KEYS = {"moe_config", "is_llama_config", "is_qwen2_config", "multi_query"}
MOE_KEYS = ("num_experts", "top_k", "moe_intermediate_size", "layers", "enable_shared_expert")
SIDE_KEYS = ("family", "target", "dtype", "vocab_size", "config", "generation_config", "dtypes")


@functools.cache
def zoo(family: str) -> Path:
    """A checkpoint in each format, shared by the tests of this process."""
    root = Path(tempfile.mkdtemp(prefix="nanotron_fast-tests-"))
    changes: dict[str, Any] = {"num_hidden_layers": 1}
    if family == "smollm3":
        changes |= {"no_rope_layers": [0], "no_rope_layer_interval": 1}
    make(family, **changes).save(root / "hf")
    nanotron_fast.convert(root / "hf", root / "nanotron")
    return root


@pytest.fixture(scope="module", autouse=True)
def no_zoo_is_left() -> Iterator[None]:
    yield
    for family in FAMILIES:
        shutil.rmtree(zoo(family))
    zoo.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def headers_are_read_once() -> Iterator[None]:
    """The configurations change here, the weights do not."""
    read = functools.cache(read_header)
    with pytest.MonkeyPatch.context() as patch:
        for format_ in (huggingface, nanotron):
            patch.setattr(format_, "read_header", read)
        yield


@contextmanager
def changed(path: Path, document: Any) -> Iterator[None]:
    """A JSON file with other contents for a while."""
    original = path.read_bytes()
    replace(path, json.dumps(document).encode())
    try:
        yield
    finally:
        replace(path, original)


def replace(path: Path, data: bytes) -> None:
    """A new file under the name: ext4 waits for the disk where a file is cut short and refilled."""
    path.unlink()
    path.write_bytes(data)


def plans_or_refuses(source: Path, **options: Any) -> None:
    """Any other exception fails the test."""
    with suppress(NanotronFastError, OSError):
        plan = nanotron_fast.plan(source, source.parent / "out", **options)
        json.dumps(plan.to_json(1))


def nasty(family: str, key: str) -> list[Any]:
    """A third of the values, another for each family; families share most of their keys."""
    return NASTY[(FAMILIES.index(family) + len(key)) % 3 :: 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_config_with_each_value_in_each_key(family: str) -> None:
    path = zoo(family) / "hf" / "config.json"
    config = json.loads(path.read_text())
    for key in sorted(config.keys() | HF_KEYS):
        for value in nasty(family, key):
            with changed(path, {**config, key: value}):
                plans_or_refuses(path.parent)
        without = {name: value for name, value in config.items() if name != key}
        with changed(path, without):
            plans_or_refuses(path.parent)


@FUZZ
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.dictionaries(st.sampled_from(sorted(HF_KEYS)), JSON, max_size=3),
    plain=st.dictionaries(st.integers(0, 40), JSON, max_size=2),
    use_window=st.booleans(),
    target=st.sampled_from(["nanotron", "nanotron-fast"]),
)
def test_config_with_anything_anywhere(
    family: str, changes: dict[str, Any], plain: dict[int, Any], use_window: bool, target: str
) -> None:
    path = zoo(family) / "hf" / "config.json"
    config = json.loads(path.read_text())
    names = sorted(config)
    changes |= {names[number % len(names)]: value for number, value in plain.items()}
    if use_window:
        changes = {"use_sliding_window": True, "sliding_window": 8, **changes}
    with changed(path, {**config, **changes}):
        plans_or_refuses(path.parent, target=target)


@pytest.mark.parametrize("has_side_file", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_config_with_each_value_in_each_key(family: str, has_side_file: bool) -> None:
    root = zoo(family) / "nanotron"
    path = root / "model_config.json"
    config = json.loads(path.read_text())
    side = root / "nanotron_fast.json"
    kept = side.read_bytes()
    if not has_side_file:
        side.unlink()
    try:
        for key in sorted(config.keys() | MODEL_CONFIG_KEYS):
            for value in nasty(family, key):
                with changed(path, {**config, key: value}):
                    plans_or_refuses(root)
    finally:
        side.write_bytes(kept)


@pytest.mark.parametrize("key", MOE_KEYS)
def test_moe_config(key: str) -> None:
    root = zoo("qwen2_moe") / "nanotron"
    path = root / "model_config.json"
    config = json.loads(path.read_text())
    moe = config["moe_config"]
    for value in NASTY:
        with changed(path, {**config, "moe_config": {**moe, key: value}}):
            plans_or_refuses(root)
    without = {name: value for name, value in moe.items() if name != key}
    with changed(path, {**config, "moe_config": without}):
        plans_or_refuses(root)


@pytest.mark.parametrize("family", FAMILIES)
def test_side_file_with_each_value_in_each_key(family: str) -> None:
    root = zoo(family) / "nanotron"
    path = root / "nanotron_fast.json"
    side = json.loads(path.read_text())
    for key in SIDE_KEYS:
        for value in nasty(family, key):
            with changed(path, {**side, key: value}):
                plans_or_refuses(root)
    for key in sorted(side["config"]):
        for value in nasty(family, key):
            with changed(path, {**side, "config": {**side["config"], key: value}}):
                plans_or_refuses(root)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"{\xff}", "not UTF-8 at byte 1"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 600 + b"1" + b"}" * 600, "nested more than 64 deep"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "hf/config.json",
        "hf/generation_config.json",
        "hf/model.safetensors.index.json",
        "nanotron/model_config.json",
        "nanotron/nanotron_fast.json",
    ],
)
def test_files_that_are_no_json_object(name: str, contents: bytes, message: str) -> None:
    path = zoo("llama") / name
    original = path.read_bytes() if path.exists() else None
    path.write_bytes(contents)
    try:
        with pytest.raises(CheckpointError, match=f"{path.name}: .*{message}"):
            nanotron_fast.plan(path.parent, path.parent.parent / "out")
    finally:
        path.unlink()
        if original is not None:
            path.write_bytes(original)


@pytest.mark.parametrize("name", ["generation_config", "dtypes"])
def test_a_side_file_without_what_may_be_left_out(name: str) -> None:
    path = zoo("llama") / "nanotron" / "nanotron_fast.json"
    document = json.loads(path.read_text())
    del document[name]
    with changed(path, document):
        if name == "generation_config":
            assert "generation_config.json" not in nanotron_fast.plan(path.parent, "out").documents
        else:
            with pytest.raises(CheckpointError, match="dtypes is None; delete the file"):
                nanotron_fast.plan(path.parent, "out")


@pytest.mark.parametrize("is_nanotron", [False, True])
@pytest.mark.parametrize(
    ("num_layers", "num_experts", "message"),
    [
        (1, 10_000, "calls for 10,000 experts in 1 layers, and the files hold tensors of"),
        (10_000, 10_000, "calls for 10,000 layers, and the files hold .* tensors"),
        (10_000, None, "calls for 10,000 layers, and the files hold .* tensors"),
    ],
)
def test_sizes_that_the_headers_do_not_bear_out(
    num_layers: int, num_experts: int | None, message: str, is_nanotron: bool
) -> None:
    """Refused before anything is made for each of them, which would take minutes and gigabytes."""
    root = zoo("qwen2_moe")
    path = root / ("nanotron/model_config.json" if is_nanotron else "hf/config.json")
    other = root / ("hf" if is_nanotron else "nanotron")
    config = json.loads(path.read_text()) | {"num_hidden_layers": num_layers}
    if num_experts is not None and is_nanotron:
        config["moe_config"]["num_experts"] = num_experts
    elif num_experts is not None:
        config["num_experts"] = num_experts
    with changed(path, config):
        with pytest.raises(CheckpointError, match=message):
            nanotron_fast.plan(path.parent, root / "out")
        with pytest.raises(CheckpointError, match=message):
            nanotron_fast.verify(other, path.parent)
        with pytest.raises(CheckpointError, match=message):
            nanotron_fast.load_into({}, path.parent, topology=nanotron_fast.Topology(), rank=0)
