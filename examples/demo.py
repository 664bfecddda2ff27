"""Makes a small Llama, converts it to Nanotron and back, trains it, and proves that it all holds.

The conversion loses nothing. The training is on the texts of docs/: two replicas, which are two
processes on the CPU, take it half-way, and one process goes on from there. What comes out is loaded
by transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanotron_fast.cli.reporting import size

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT = "A checkpoint of Nanotron"
VOCAB_SIZE = 2048
TRAIN_STEPS, HALF_WAY = 6, 4


def main() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="nanotron_fast-demo-") as folder:
        os.chdir(folder)  # so that commands name their files as a user would
        hf, nanotron, back, texts, run_folder = map(
            Path, ("llama-hf", "llama-nanotron", "llama-back", "texts", "run")
        )
        texts.mkdir()
        for path in sorted(DOCS.glob("*.md")):
            (texts / f"{path.stem}.txt").write_bytes(path.read_bytes())
        make_model(hf, texts)
        convert_there_and_back(hf, nanotron, back)
        train(nanotron, texts, run_folder)
        load_what_was_trained(hf, run_folder)
    print(f"\nAll of it holds. {time.perf_counter() - STARTED:.1f} s.")


def make_model(hf: Path, texts: Path) -> None:
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    step(f"1. a Llama with a tokenizer, random weights (transformers {transformers.__version__})")
    tokenizer = make_tokenizer(path.read_text() for path in sorted(texts.iterdir()))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(hf, max_shard_size="4MB")
    tokenizer.save_pretrained(hf)
    shards = sorted(hf.glob("*.safetensors"))
    say(f"{len(shards)} shards with an index, {size(sum(p.stat().st_size for p in shards))}")


def convert_there_and_back(hf: Path, nanotron: Path, back: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    step("2. to Nanotron, for two tensor-parallel ranks on each of two pipeline stages")
    run("convert", hf, nanotron, "--tp", "2", "--pp", "2")
    for path in sorted(nanotron.glob("model/model/decoder/0/pp_block/attn/**/*.safetensors")):
        say(str(path.relative_to(nanotron)))

    step("3. every tensor of one against every tensor of the other")
    run("verify", hf, nanotron)

    step("4. back to Hugging Face")
    run("convert", nanotron, back, "--max-shard-size", "3MB")

    step("5. read both with safetensors, tensor by tensor")
    ours, theirs = tensors_of(back), tensors_of(hf)
    check(set(ours) == set(theirs), f"the same {len(theirs)} names")
    same = all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].view(torch.int16), theirs[name].view(torch.int16))
        for name in theirs
    )
    check(same, "every bit of every tensor is the same")

    step("6. load the result with transformers")
    before, after = (
        LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in (hf, back)
    )
    ids = AutoTokenizer.from_pretrained(back)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        check(
            torch.equal(before(ids).logits, after(ids).logits),
            f"the same logits for {ids.numel()} tokens",
        )


def train(nanotron: Path, texts: Path, run_folder: Path) -> None:
    import yaml

    from nanotron_fast.train import Trainer, TrainingConfig

    config = Path("train.yaml")
    config.write_text(yaml.safe_dump(training_config(nanotron, texts, run_folder), sort_keys=False))

    step("7. train what was converted: two replicas, with the optimizer shared out (ZeRO-1)")
    run("train", config, f"--tokens.train_steps={HALF_WAY}", num_ranks=2)
    check(last_checkpoint(run_folder) == HALF_WAY, f"latest.txt names step {HALF_WAY}")

    step("8. go on with it in this one process, from Python, with both replicas' samples")
    changes = ["--parallelism.dp=1", "--tokens.batch_accumulation_per_replica=2"]
    result = Trainer(TrainingConfig.load(config, changes), is_quiet=True).run()
    say(f"trained to step {result.step}; {result.checkpoint} is its checkpoint")
    check(last_checkpoint(run_folder) == TRAIN_STEPS, f"latest.txt names step {TRAIN_STEPS}")
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    steps = [line["step"] for line in lines]
    check(steps == [*range(1, TRAIN_STEPS + 1)], f"{len(steps)} steps in metrics.jsonl, each once")
    losses = [line["loss"] for line in lines]
    check(
        losses[-1] < losses[HALF_WAY - 1] < losses[0],
        f"the loss falls: {losses[0]:.2f}, {losses[HALF_WAY - 1]:.2f}, {losses[-1]:.2f}",
    )


def training_config(weights: Path, texts: Path, run_folder: Path) -> dict[str, Any]:
    """Nanotron's YAML. In fp32, which CPUs without bf16 units compute fastest."""
    return {
        "general": {"project": "demo"},
        "parallelism": {"dp": 2, "pp": 1, "tp": 1},
        "model": {"init_method": {"path": str(weights)}, "dtype": "float32"},
        "checkpoints": {
            "checkpoints_path": str(run_folder),
            "resume_checkpoint_path": str(run_folder),
            "checkpoint_interval": 100,
            "export_hf": True,
        },
        "tokens": {
            "sequence_length": 128,
            "micro_batch_size": 2,
            "batch_accumulation_per_replica": 1,
            "train_steps": TRAIN_STEPS,
        },
        "optimizer": {
            "optimizer_factory": {
                "name": "adamW",
                "adam_eps": 1e-8,
                "adam_beta1": 0.9,
                "adam_beta2": 0.95,
                "torch_adam_is_fused": True,
            },
            "zero_stage": 1,
            "weight_decay": 0.1,
            "clip_grad": 1.0,
            "accumulate_grad_in_fp32": False,
            "learning_rate_scheduler": {"learning_rate": 2e-3, "lr_warmup_steps": 2},
        },
        "data_stages": [
            {
                "name": "docs",
                "start_training_step": 1,
                "data": {"dataset": {"hf_dataset_or_datasets": str(texts)}, "seed": 42},
            }
        ],
    }


def load_what_was_trained(hf: Path, run_folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    step("9. what does it say?")
    checkpoint = run_folder / str(TRAIN_STEPS)
    output = run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "8", "--json")
    said = json.loads(output)
    say(f"  {json.dumps(said)}")

    step("10. load its Hugging Face folder with transformers")
    exported = checkpoint / "hf"
    model = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(exported)(PROMPT, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.numel() :].tolist()
    check(new == said["token_ids"], f"it says the same {len(new)} tokens")
    before, after = tensors_of(hf), tensors_of(exported)
    check(set(before) == set(after), f"the {len(after)} tensors that the model began with")
    changed = sum(not torch.equal(before[name].float(), after[name]) for name in after)
    check(changed == len(after), "each of them trained")


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-pair tokenizer trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tensors_of(root: Path) -> dict[str, Any]:
    from safetensors import safe_open

    tensors = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return tensors


def last_checkpoint(run_folder: Path) -> int:
    return int((run_folder / "latest.txt").read_text())


def run(command: str, *words: object, num_ranks: int = 1) -> str:
    """Runs nanotron-fast as a user would, and shows what it says; returns that of stdout."""
    given = [command, *map(str, words)]
    shown = " ".join(f'"{word}"' if " " in word else word for word in given)
    start: Sequence[str] = ("-m", "nanotron_fast")
    if num_ranks == 1:
        say(f"$ nanotron-fast {shown}")
    else:
        say(f"$ torchrun --nproc-per-node={num_ranks} -m nanotron_fast {shown}")
        start = ("-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", *start)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if num_ranks > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, and tell of it
    lines = []
    with subprocess.Popen(
        [sys.executable, *start, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "--json" not in given:
                say(f"  {line.rstrip()}")
    check(process.returncode == 0, f"exit code {process.returncode}")
    return "".join(lines)


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
