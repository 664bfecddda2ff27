"""`nanotron-fast generate`: text that a checkpoint's model continues."""

from __future__ import annotations

import os
from typing import Annotated

import typer


def generate(
    ckpt: Annotated[str, typer.Argument(help="A directory in either format, or a Hub id.")],
    *,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=0, help="At the most.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sample at this temperature. (default: the likeliest token)"),
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Sample among as few tokens as have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is sampled.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_ID", help="Take the tokenizer from here, not from CKPT."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Continue a text with a checkpoint's model, in either format.

    On a GPU where there is one. Under torchrun the ranks share the model by tensor parallelism.
    """
    # Of the libraries that are imported here, and that say more than is wanted.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import torch

    from nanotron_fast.checkpoints.processes import connect
    from nanotron_fast.cli.reporting import counting
    from nanotron_fast.models.generate import Sampling
    from nanotron_fast.models.generate import generate as continued

    sampling = Sampling(temperature, top_p, seed)
    processes = connect()
    try:
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        group = None
        if processes.world_size > 1:
            import torch.distributed as dist

            group = dist.new_group(backend="gloo" if device.type == "cpu" else "nccl")
        is_quiet = json or processes.rank != 0
        with processes.step(), counting("generating", max_new_tokens, is_quiet=is_quiet) as count:
            found = continued(
                ckpt,
                prompt,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                tokenizer=tokenizer,
                group=group,
                device=device,
                on_token=count,
            )
    finally:
        processes.close()
    if processes.rank != 0:
        return
    if json:
        import json as documents

        typer.echo(documents.dumps(found.to_json(), indent=2))
    else:
        typer.echo(found.text)
