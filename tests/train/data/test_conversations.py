"""Conversations: which tokens are learned, and how several share a sample."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.batches import Batches
from nanotron_fast.train.data.cache import CachedTokens, cached_tokens
from nanotron_fast.train.data.conversations import ChatEncoder, ChatRecipe
from nanotron_fast.train.data.packing import PackedConversations, pack
from nanotron_fast.train.data.text import Rows, open_source
from nanotron_fast.train.data.tokenizer import load_tokenizer
from tests.train.data.material import make_tokenizer

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "the lazy dog."},
]
ANSWERS = "jumps over<|im_end|>the lazy dog.<|im_end|>"


def learned_text(tokenizer: Any, tokens: list[int], is_learned: list[bool]) -> str:
    chosen = [token for token, learned in zip(tokens, is_learned, strict=True) if learned]
    return str(tokenizer.decode(chosen))


def test_answers_alone_are_learned_with_the_end_of_their_turns(tokenizer: Any) -> None:
    [(tokens, is_learned)] = ChatEncoder(tokenizer).row({"messages": MESSAGES}, "here")
    # The model sees what transformers makes of the conversation, to the token.
    assert tokens == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert learned_text(tokenizer, tokens, is_learned) == ANSWERS


def test_sharegpt_and_messages_with_empty_columns(tokenizer: Any) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[each["role"]], "value": each["content"]} for each in MESSAGES]
    expected = ChatEncoder(tokenizer).row({"messages": MESSAGES}, "here")
    assert ChatEncoder(tokenizer).row({"conversations": turns}, "here") == expected
    padded = [{**each, "tool_calls": None} for each in MESSAGES]
    assert ChatEncoder(tokenizer).row({"messages": padded, "prompt": None}, "here") == expected


def test_a_template_that_says_what_is_generated(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}A:"
        "{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
        "{% else %}U:{{ message['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, chat_template=template))
    [(tokens, is_learned)] = ChatEncoder(tokenizer).row({"messages": MESSAGES}, "here")
    assert learned_text(tokenizer, tokens, is_learned) == "jumps over</s>the lazy dog.</s>"


def test_a_template_that_rewrites_earlier_answers(tmp_path: Path) -> None:
    """As those that leave out earlier reasoning do: each answer is learned as it was given."""
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, chat_template=template))
    first, second = ChatEncoder(tokenizer).row({"messages": MESSAGES}, "here")
    assert learned_text(tokenizer, *first) == "<think></think>jumps over<|im_end|>"
    assert learned_text(tokenizer, *second) == "<think></think>the lazy dog.<|im_end|>"
    asked = tokenizer.apply_chat_template(MESSAGES[:4], add_generation_prompt=True)["input_ids"]
    assert second[0][: len(asked)] == asked
    assert not any(second[1][: len(asked)])


def test_prompt_and_completion_are_learned_as_nanotron_does(bos_tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(bos_tokenizer_folder)
    row = {"prompt": "the quick", "completion": " brown fox"}
    [(tokens, is_learned)] = ChatEncoder(tokenizer).row(row, "here")
    assert tokens == tokenizer("the quick brown fox</s>")["input_ids"]
    num_given = len(tokenizer("the quick")["input_ids"])
    assert is_learned == [False] * num_given + [True] * (len(tokens) - num_given)


def test_a_completion_of_messages_is_learned_alone(tokenizer: Any) -> None:
    row = {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}
    [(tokens, is_learned)] = ChatEncoder(tokenizer).row(row, "here")
    assert tokens == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert learned_text(tokenizer, tokens, is_learned) == "the lazy dog.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has messages, or prompt and completion, and this has text"),
        ({"messages": []}, "messages: .* is no list of messages"),
        ({"messages": [{"content": "a"}]}, "message 0 is .*without a role"),
        ({"messages": "a"}, "is no list of messages"),
        ({"prompt": "a"}, "this has prompt"),
    ],
)
def test_rows_that_are_no_conversation(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"here: .*{message}|here: {message}"):
        ChatEncoder(tokenizer).row(row, "here")


def test_templates_that_do_not_serve(tmp_path: Path, bos_tokenizer_folder: Path) -> None:
    encoder = ChatEncoder(load_tokenizer(bos_tokenizer_folder))
    with pytest.raises(DataError, match="no chat template"):
        encoder.row({"messages": MESSAGES}, "here")
    refusing = "{{ raise_exception('roles must alternate') }}"
    encoder.tokenizer.chat_template = refusing
    with pytest.raises(DataError, match="here: the chat template refuses it: roles must alternate"):
        encoder.row({"messages": MESSAGES}, "here")
    encoder.tokenizer.chat_template = (
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}Answer:{% endif %}"
    )
    with pytest.raises(DataError, match="does not begin an answer as it asks for one"):
        encoder.row({"messages": MESSAGES}, "here")


def conversations_of(path: Path, tokenizer: Any, rows: list[dict[str, Any]]) -> CachedTokens:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cached_tokens(
        open_source(str(path), column=None),
        ChatRecipe.of(tokenizer),
        recipe_identity=ChatRecipe.identity(tokenizer),
        token_size=2,
    )


def test_samples_hold_whole_conversations(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q" * n},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in (3, 30, 8, 120, 5, 21, 4, 13)
    ]
    rows.append({"messages": [{"role": "user", "content": "no answer"}]})
    found = conversations_of(tmp_path / "a.jsonl", tokenizer, rows)
    samples = PackedConversations(found, 63, pad_token_id=9)
    # One is too long for its answer, and one has none.
    assert samples.num_left_out == 2
    seen = []
    for i in range(len(samples)):
        sample = samples[i]
        assert sample.positions is not None
        assert sample.is_learned is not None
        begins = [*np.flatnonzero(sample.positions == 0).tolist(), len(sample.tokens)]
        for begin, end in pairwise(begins):
            tokens, learned = sample.tokens[begin:end], sample.is_learned[begin:end]
            assert sample.positions[begin:end].tolist() == list(range(end - begin))
            if (tokens == 9).all():
                assert end == len(sample.tokens)
                assert not learned.any()
                continue
            seen.append(tokens.tolist())
            assert learned_text(tokenizer, tokens.tolist(), learned.tolist()) == "yes<|im_end|>"
    fitting = [row["messages"] for n, row in enumerate(rows) if n not in (3, 8)]
    expected = [tokenizer.apply_chat_template(each)["input_ids"] for each in fitting]
    assert sorted(seen) == sorted(expected)
    [micro] = Batches(
        samples=samples, sequence_length=63, micro_batch_size=1, keeps_documents_apart=True
    ).batch(1)
    assert micro.position_ids is not None
    assert int((micro.labels >= 0).sum()) == int(samples[0].is_learned.sum())
    with pytest.raises(DataError, match=r"none of its 9 conversations has an answer within 5 tok"):
        PackedConversations(found, 4, pad_token_id=9)
    assert len(PackedConversations(found, 63, pad_token_id=9, max_conversations=1)) == 1


def test_conversations_that_are_refused_are_named(tmp_path: Path, tokenizer: Any) -> None:
    asked = {"role": "user", "content": "q"}
    row = {"messages": [asked, {"role": "assistant", "content": "smile \ud83d"}]}
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: '\\ud83d' is half of a surrogate"):
        conversations_of(tmp_path / "a.jsonl", tokenizer, [row])
    row["messages"][1]["content"] += "\ude00"
    conversations_of(tmp_path / "a.jsonl", tokenizer, [row])
    # transformers takes no conversation without a message, as before this answer.
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: the chat template refuses it"):
        conversations_of(tmp_path / "b.jsonl", tokenizer, [{"messages": row["messages"][1:]}])


def test_a_conversation_that_is_cut_keeps_what_fits(tmp_path: Path, tokenizer: Any) -> None:
    row = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z" * 99}]
    }
    found = conversations_of(tmp_path / "a.jsonl", tokenizer, [row])
    sample = PackedConversations(found, 31, pad_token_id=0)[0]
    assert (
        sample.tokens.tolist() == tokenizer.apply_chat_template(row["messages"])["input_ids"][:32]
    )
    assert sample.is_learned is not None
    assert sample.is_learned[-1]


def test_packing_wastes_little_and_cuts_nothing() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 100, 3000).tolist()
    bins = pack(enumerate(sizes), 100)
    assert sorted(number for each in bins for number in each) == list(range(3000))
    assert max(sum(sizes[number] for number in each) for each in bins) <= 100
    assert sum(sizes) / (100 * len(bins)) > 0.95
    assert [each[0] for each in bins] == sorted(each[0] for each in bins)
    assert pack(enumerate(sizes), 100) == bins


def test_rows_of_a_dataset_are_conversations_too(tokenizer: Any) -> None:
    block = Rows([{"messages": MESSAGES}] * 2, "table", 10, ends_group=True)
    encoded = ChatEncoder(tokenizer)(block)
    assert encoded.ends.tolist() == [len(encoded.tokens) // 2, len(encoded.tokens)]
    assert encoded.is_learned is not None
    with pytest.raises(DataError, match=r"table, row 1,000 \(from 0\): .*has nothing"):
        ChatEncoder(tokenizer)(Rows([{}], "table", 10, 1000))
    with pytest.raises(DataError, match=r"and this has messages \(null\), id$"):
        ChatEncoder(tokenizer)(Rows([{"messages": None, "id": 3}], "table", 10))
