"""A user's script, unchanged, under `nanotron-fast run` and after `import nanotron_fast.auto`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.nanotron.installed import has_qwen2
from tests.nanotron.trainer_ranks import Run, configuration
from tests.parallel.ranks import ROOT

# As Nanotron's own run_train.py: nothing of ours in it, and it says cuda.
SCRIPT = """
import argparse
import sys

import beside  # a module in the script's own folder
import torch
from nanotron.parallel.pipeline_parallel.utils import get_input_output_pp_ranks
from nanotron.trainer import DistributedTrainer

if beside.IS_MAIN:
    from nanotron.data.dataloader import dummy_infinite_data_generator
else:
    from nanotron.dataloader import dummy_infinite_data_generator

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", required=True)
    trainer = DistributedTrainer(parser.parse_args().config_file)
    first, last = get_input_output_pp_ranks(model=trainer.model)
    batches = dummy_infinite_data_generator(
        micro_batch_size=trainer.micro_batch_size,
        sequence_length=trainer.sequence_length,
        input_pp_rank=first,
        output_pp_rank=last,
        vocab_size=trainer.model_config.vocab_size,
        seed=3,
        parallel_context=trainer.parallel_context,
        **beside.more(trainer),
    )()
    trainer.train({"all": batches} if beside.IS_MAIN else batches)
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    print("stepped with", type(trainer.optimizer.get_base_optimizer()).__name__)
"""
BESIDE = """
IS_MAIN = {is_main}
def more(trainer):
    if not IS_MAIN:
        return {{}}
    return {{"use_position_ids": True, "cp_pg": trainer.parallel_context.cp_pg}}
"""


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def lay_out(folder: Path, size: int) -> None:
    is_main = importlib.util.find_spec("nanotron.data") is not None
    family = "qwen2" if has_qwen2() else "llama"
    (folder / "run_train.py").write_text(SCRIPT)
    (folder / "beside.py").write_text(BESIDE.format(is_main=is_main))
    config = configuration(str(folder / "saved"), family, size, is_main, Run())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_users_script_trains_under_torchrun(tmp_path: Path) -> None:
    lay_out(tmp_path, 2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    script = ("run_train.py", "--config-file", "config.yaml")
    done = run(*launcher, "-m", "nanotron_fast", "run", "--cpu", *script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("FusedAdamW") == 2  # the ranks' lines may run into each other
    assert (tmp_path / "saved/2/model_config.json").is_file()


def test_without_torchrun_it_is_one_process(tmp_path: Path) -> None:
    lay_out(tmp_path, 1)
    words = ("run_train.py", "--config-file", "config.yaml")
    done = run("-m", "nanotron_fast", "run", "--cpu", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("FusedAdamW") == 1


def test_it_says_how_it_got_past_the_cycle(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import nanotron_fast.auto\n"
        "from nanotron.models.llama import GLUActivation\n"
        "from nanotron_fast import disable, status\n"
        "from nanotron_fast.patch.nanotron.targets import FUSED\n"
        "assert 'replacements' in GLUActivation.forward.__code__.co_filename\n"
        "off = {each.target.op for each in status() if each.state != 'on'}\n"
        "assert off == {*FUSED}, off\n"
        "disable()\n"
        "assert 'replacements' not in GLUActivation.forward.__code__.co_filename\n"
        "print('done')\n"
    )
    done = run("script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("done\n")
    assert ("got past Nanotron's import cycle" in done.stdout) is not has_qwen2()


def test_the_scripts_own_error_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nraise SystemExit(len(sys.argv))\n")
    done = run("-m", "nanotron_fast", "run", "script.py", "--cpu", "x", cwd=tmp_path)
    assert done.returncode == 3, done.stdout  # the script's own --cpu is not ours


def test_the_step_benchmark_runs(tmp_path: Path) -> None:
    words = ("--cpu", "--rounds", "1", "--warmup", "0", "--steps", "2")
    done = run(str(ROOT / "benchmarks/bench_step.py"), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    shown = [line.split("  ")[0] for line in done.stdout.splitlines() if line.endswith("x")]
    assert shown[0] == "off"
    assert shown[-2:] == ["all", "all, fused"]
