"""What an installed wheel must do: convert there and back, verify, say what an extra would add.

    python tests/wheel/trial.py

Needs nothing beside the wheel and what it depends on, and runs the command that lies beside the
interpreter, with nothing else on PATH.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().parents[1] / "golden" / "llama_untied" / "hf"
BIN = Path(sys.executable).parent


def run(*words: str | Path, code: int = 0) -> str:
    """Runs the command in the temporary folder that is the working directory."""
    done = subprocess.run(
        [BIN / "nanotron-fast", *words],
        env={**os.environ, "PATH": str(BIN)},
        capture_output=True,
        text=True,
    )
    if done.returncode != code:
        sys.exit(f"nanotron-fast {words}: {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"$ nanotron-fast {' '.join(map(str, words))}\n{done.stdout}{done.stderr}", end="")
    return done.stdout + done.stderr


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run("convert", MODEL, "nanotron", "--tp", "2", "--pp", "2")
        run("convert", "nanotron", "hf")
        said = run("verify", MODEL, "hf")
        if not said.startswith("equal: "):
            sys.exit(f"verify says {said!r}")
        said = run("train", code=2)
        if "pip install 'nanotron_fast[train]'" not in said:
            sys.exit(f"train says {said!r}")


if __name__ == "__main__":
    main()
