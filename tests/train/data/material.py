"""Tiny tokenizers, and token files made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEXT = "the quick brown fox jumps over the lazy dog. Ünïcödé, 日本語 and 12345 numbers!\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    folder: Path, *, vocab_size: int = 320, bos: bool = False, chat_template: str | None = None
) -> Path:
    """A byte-level tokenizer trained on a line, saved as transformers does it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special[2:],
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def write_tokens(
    folder: Path, name: str, documents: list[list[int]], *, size: int = 2, metadata: bool = True
) -> None:
    """A token file with its index, as datatrove writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    tokens = np.array([token for document in documents for token in document])
    tokens.astype(f"<u{size}").tofile(path)
    ends = np.cumsum([len(document) for document in documents])
    ends.astype("<u8").tofile(f"{path}.index")
    if metadata:
        Path(f"{path}.metadata").write_text(
            f"some/tokenizer|{size}\n{len(tokens)}\n{len(tokens)} T"
        )
