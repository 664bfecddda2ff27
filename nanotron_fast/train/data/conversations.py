"""Conversations made into tokens by a chat template, of which the answers alone are learned."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.encode import BlockEncoder, Encoded, packed, rows_of
from nanotron_fast.train.data.text import Block
from nanotron_fast.train.data.tokenizer import fingerprint

# A template may say itself which parts an assistant generates.
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")
# The names of ShareGPT's roles.
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}

Message = dict[str, Any]
Learned = tuple[list[int], list[bool]]


@dataclass(frozen=True, slots=True)
class ChatRecipe:
    """For conversations, in a form that goes to another process.

    Args:
        tokenizer: of transformers, pickled.
    """

    tokenizer: bytes

    @classmethod
    def of(cls, tokenizer: Any) -> ChatRecipe:
        """The recipe of a tokenizer."""
        return cls(pickle.dumps(tokenizer))

    @staticmethod
    def identity(tokenizer: Any) -> str:
        """A digest of what it makes of conversations."""
        return hashlib.sha256(f"chat\0{fingerprint(tokenizer)}".encode()).hexdigest()

    def build(self) -> BlockEncoder:
        return ChatEncoder(pickle.loads(self.tokenizer))


@dataclass(frozen=True, slots=True)
class ChatEncoder:
    """Rows to tokens. A row holds one of these:

    - `messages`, each with a role and content; or `conversations`, likewise or with from and value;
    - `prompt` and `completion`, both text, or both messages.

    What an assistant says is learned, with the end of its turn; of the second kind the completion.
    """

    tokenizer: Any

    def __call__(self, block: Block, /) -> Encoded:
        found = [each for place, row in rows_of(block) for each in self.row(row, place)]
        ends_group = getattr(block, "ends_group", False)
        return packed(
            [tokens for tokens, _ in found],
            [learned for _, learned in found],
            ends_group,
            block.num_bytes,
        )

    def row(self, row: Mapping[str, Any], place: str) -> list[Learned]:
        """The tokens of a row, and whether each is learned: one sequence, or one an answer.

        Raises DataError.
        """
        for key in ("messages", "conversations"):
            if row.get(key) is not None:
                return self._chat(_messages(row[key], f"{place}: {key}"), row, place)
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            return [self._completion(prompt, completion, place)]
        if isinstance(prompt, Sequence) and isinstance(completion, Sequence):
            before = _messages(prompt, f"{place}: prompt")
            after = _messages(completion, f"{place}: completion")
            return self._chat([*before, *after], row, place, learned_from=len(before))
        there = [f"{key} (null)" if row[key] is None else str(key) for key in row]
        raise DataError(
            f"{place}: a conversation has messages, or prompt and completion, and this has "
            f"{', '.join(there) or 'nothing'}"
        )

    def _completion(self, prompt: str, completion: str, place: str) -> Learned:
        """Text after text. As in Nanotron, as many tokens are given as the prompt alone has."""
        end = self.tokenizer.eos_token
        if end is None:
            raise DataError(
                f"{place}: a completion ends with eos_token, and the tokenizer has none"
            )
        tokens = list(self.tokenizer(f"{prompt}{completion}{end}")["input_ids"])
        num_given = min(len(self.tokenizer(prompt)["input_ids"]), len(tokens))
        return tokens, [False] * num_given + [True] * (len(tokens) - num_given)

    def _chat(
        self, messages: list[Message], row: Mapping[str, Any], place: str, learned_from: int = 0
    ) -> list[Learned]:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{place}: tokenizer {self.tokenizer.name_or_path} has no chat template; put a "
                "chat_template.jinja into its folder, or give prompt and completion as text"
            )
        template = _Template(self.tokenizer, row.get("tools") or None, place)
        if not learned_from and template.is_tagged:
            return [template.tagged(messages)]
        answers = [
            number
            for number, message in enumerate(messages)
            if number >= learned_from and message["role"] == "assistant"
        ]
        whole = template.text(messages)
        spans = [template.span(messages, number) for number in answers]
        if all(whole.startswith(text) for text, _, _ in spans):
            return [self._tokens(whole, [(begin, end) for _, begin, end in spans])]
        # The template says earlier answers in another way, as without their reasoning: each answer
        # is learned from what precedes it when it is given.
        return [self._tokens(text, [(begin, end)]) for text, begin, end in spans]

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> Learned:
        """Tokens of a text; those are learned that lie in one of the spans, if only in part."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(encoded["input_ids"]), [
                any(begin < last and first < end for begin, end in spans) and first < last
                for first, last in encoded["offset_mapping"]
            ]
        tokens: list[int] = []
        learned: list[bool] = []
        bounds = [0, *(bound for span in spans for bound in span), len(text)]
        for number, (begin, end) in enumerate(pairwise(bounds)):
            part = self.tokenizer.encode(text[begin:end], add_special_tokens=False)
            tokens += part
            learned += [number % 2 == 1] * len(part)
        return tokens, learned


@dataclass(frozen=True, slots=True)
class _Template:
    """A tokenizer's chat template, for one row."""

    tokenizer: Any
    tools: Any
    place: str

    @property
    def is_tagged(self) -> bool:
        """Whether the template says itself what an assistant generates."""
        return (
            _GENERATION_TAG.search(self.tokenizer.get_chat_template(tools=self.tools)) is not None
        )

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tools=self.tools, **options)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{self.place}: the chat template refuses it: {error}") from error

    def text(self, messages: list[Message], *, is_asked: bool = False) -> str:
        """The template's text; with `is_asked`, up to where the next answer begins."""
        return str(self._apply(messages, tokenize=False, add_generation_prompt=is_asked))

    def tagged(self, messages: list[Message]) -> Learned:
        """Tokens, and those that the template says are generated."""
        found = self._apply(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(each) for each in found["assistant_masks"]]

    def span(self, messages: list[Message], number: int) -> tuple[str, int, int]:
        """The text up to an answer's end, and where in it the answer begins and ends."""
        before = self.text(messages[:number], is_asked=True)
        after = self.text(messages[: number + 1])
        if not after.startswith(before):
            raise DataError(
                f"{self.place}: the chat template does not begin an answer as it asks for one; "
                "{% generation %} in it can say which part is the answer"
            )
        # A line end after the end of a turn is the template's, and not the answer's.
        stripped = after.rstrip()
        ends_turn = any(stripped.endswith(token) for token in self.tokenizer.all_special_tokens)
        is_shorter = ends_turn and len(stripped) > len(before)
        return after, len(before), len(stripped) if is_shorter else len(after)


def _messages(given: Any, place: str) -> list[Message]:
    """Messages with a role and content, whatever they are called."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise DataError(f"{place}: {given!r} is no list of messages")
    messages = []
    for number, each in enumerate(given):
        if isinstance(each, Mapping) and "from" in each and "value" in each:
            each = {"role": _ROLES.get(each["from"], each["from"]), "content": each["value"]}
        if not isinstance(each, Mapping) or not isinstance(each.get("role"), str):
            raise DataError(f"{place}: message {number} is {each!r}, without a role")
        # A table has every key in every row, and a template asks whether one is there.
        messages.append({key: value for key, value in each.items() if value is not None})
    return messages
