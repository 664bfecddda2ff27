"""`nanotron-fast tokenize`: text to a folder of tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from nanotron_fast import interruption


def tokenize(
    src: Annotated[
        str,
        typer.Argument(
            help="A file, folder or glob of .txt or .jsonl, or what `datasets.load_dataset` takes."
        ),
    ],
    dst: Annotated[str, typer.Argument(help="The folder to make: a Nanoset.")],
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR_OR_ID", help="For transformers' AutoTokenizer.")
    ],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. (default: one a core)")
    ] = None,
    eos: Annotated[
        bool,
        typer.Option(
            "--eos/--no-eos",
            help="End each document with the tokenizer's eos_token, and leave out its other "
            "special tokens; or have those that it adds of itself.",
        ),
    ] = True,
    text_column: Annotated[
        str, typer.Option(help="The JSON key, or the column, that holds the text.")
    ] = "text",
    split: Annotated[str, typer.Option(help="Of a dataset; files have none.")] = "train",
    config_name: Annotated[str | None, typer.Option(help="Of a dataset; files have none.")] = None,
    max_tokens_per_file: Annotated[
        int, typer.Option(min=1, help="Begin another file beyond so many.")
    ] = 10**9,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors alone.")] = False,
) -> None:
    """Make tokens of text, once for all runs: .ds files, which Nanotron and datatrove read too.

    DST appears when it is whole. It is the same for any number of workers.
    """
    from nanotron_fast.cli import reporting
    from nanotron_fast.train.data.tokenize import tokenize as make_tokens
    from nanotron_fast.units import count

    progress = reporting.Progress(is_quiet=quiet or json)
    with progress.running("tokenizing") as on_progress:
        report = make_tokens(
            src,
            dst,
            tokenizer=tokenizer,
            workers=workers,
            eos=eos,
            text_column=text_column,
            split=split,
            config_name=config_name,
            max_tokens_per_file=max_tokens_per_file,
            on_total=progress.expect,
            on_progress=on_progress,
        )
    with interruption.telling(lambda: f"{report.destination} is whole"):
        if json:
            import json as json_module

            typer.echo(json_module.dumps(report.to_json(), indent=2))
        elif not quiet:
            typer.echo(
                f"{count(report.tokens, 'token')} of "
                f"{count(report.documents, 'document')} in "
                f"{report.destination}, {report.token_size} bytes each; {report.seconds:.1f} s, "
                f"{report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
            )
