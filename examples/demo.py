"""Makes a small Llama, converts it to Nanotron and back, and proves that nothing was lost."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanotron_fast.cli.reporting import size

TEXT = (
    "A checkpoint is what is left of a training run when the machines have gone home.",
    "Tensor parallelism splits every matrix, and the packed ones chunk by chunk.",
    "Nothing here needs a GPU, and nothing is loaded twice.",
)


def main() -> None:
    import torch
    import transformers
    from safetensors import safe_open
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="nanotron_fast-demo-") as folder:
        root = Path(folder)
        hf, nanotron, back = root / "llama-hf", root / "llama-nanotron", root / "llama-back"

        step(
            f"1. a Llama with a tokenizer, random weights (transformers {transformers.__version__})"
        )
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(hf, max_shard_size="100MB")
        tokenizer.save_pretrained(hf)
        shards = sorted(hf.glob("*.safetensors"))
        say(f"{len(shards)} shards with an index, {size(sum(p.stat().st_size for p in shards))}")

        step("2. to Nanotron, for two tensor-parallel ranks on each of two pipeline stages")
        run("convert", hf, nanotron, "--tp", "2", "--pp", "2")
        for path in sorted(nanotron.glob("model/model/decoder/0/pp_block/attn/**/*.safetensors")):
            say(str(path.relative_to(nanotron)))

        step("3. every tensor of one against every tensor of the other")
        run("verify", hf, nanotron)

        step("4. back to Hugging Face")
        run("convert", nanotron, back, "--max-shard-size", "80MB")

        step("5. read both with safetensors, tensor by tensor")
        ours, theirs = tensors_of(back, safe_open), tensors_of(hf, safe_open)
        check(set(ours) == set(theirs), f"the same {len(theirs)} names")
        same = all(
            ours[name].dtype == theirs[name].dtype
            and torch.equal(ours[name].view(torch.int16), theirs[name].view(torch.int16))
            for name in theirs
        )
        check(same, "every bit of every tensor is the same")

        step("6. load the result with transformers")
        before, after = (
            LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
            for path in (hf, back)
        )
        ids = AutoTokenizer.from_pretrained(back)(TEXT[0], return_tensors="pt").input_ids
        with torch.no_grad():
            check(
                torch.equal(before(ids).logits, after(ids).logits),
                f"the same logits for {ids.numel()} tokens",
            )
    print(f"\nAll of it holds. {time.perf_counter() - STARTED:.1f} s.")


def make_tokenizer() -> object:
    """A byte-pair tokenizer trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tensors_of(root: Path, safe_open: object) -> dict[str, object]:
    tensors = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return tensors


def run(*words: object) -> None:
    """Runs nanotron-fast as a user would."""
    say("$ nanotron-fast " + " ".join(getattr(word, "name", str(word)) for word in words))
    command = [sys.executable, "-m", "nanotron_fast", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    for line in (result.stdout + result.stderr).splitlines():
        say(f"  {line}")
    check(result.returncode == 0, f"exit code {result.returncode}")


def step(title: str) -> None:
    print(f"\n{title}", flush=True)


def say(line: str) -> None:
    print(f"   {line}", flush=True)


def check(holds: bool, claim: str) -> None:
    say(f"{'ok' if holds else 'FAILED'}: {claim}")
    if not holds:
        sys.exit(1)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()
