"""What the documentation's site has beside the pages of this folder; mkdocs calls it.

README, CONTRIBUTING and CHANGELOG are pages, as they are. A link to a file that is no page leads
to the repository, where its address is known, and is plain text otherwise. The page of the commands
is made of the commands themselves, and where a page has `<!-- options of convert -->`, it gets a
table of the keywords that stand behind `choices` there.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
COMMANDS = "commands.md"
_OPTIONS = re.compile(r"<!-- options of (\w+) -->")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:]*?)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made or lie outside of the folder."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, source, config)))
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links of a page of this folder that lead out of it."""
    source = page.file.src_uri
    if source in PAGES or source == COMMANDS:
        return markdown
    markdown = _OPTIONS.sub(lambda match: options_table(match[1]), markdown)
    return _relinked(markdown, f"docs/{source}", config)


def _relinked(text: str, source: str, config: Any) -> str:
    """The text of a file of the repository, its links as a page of the site has them."""
    here = PurePosixPath(source).parent

    def replaced(match: re.Match[str]) -> str:
        words, link, anchor = match[1], match[2], match[3] or ""
        if not link:
            return match[0]
        target = (ROOT / here / link).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            raise ValueError(f"{source}: {link} leads to no file")
        path = target.relative_to(ROOT).as_posix()
        for page, lies_at in PAGES.items():
            if path == lies_at:
                return f"[{words}]({_from(source, page)}{anchor})"
        if path.startswith("docs/") and target.is_file():
            return f"[{words}]({_from(source, path.removeprefix('docs/'))}{anchor})"
        repository = config["repo_url"]
        if not repository:
            return words
        kind = "tree" if target.is_dir() else "blob"
        return f"[{words}]({repository.rstrip('/')}/{kind}/main/{path}{anchor})"

    return _outside_of_code(text, lambda part: _LINK.sub(replaced, part))


def _from(source: str, page: str) -> str:
    """The way from a source's page to another."""
    depth = len(PurePosixPath(source.removeprefix("docs/")).parts) - 1
    return "../" * (depth if source.startswith("docs/") else 0) + page


def _outside_of_code(text: str, change: Any) -> str:
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def commands_page() -> str:
    """All commands with their arguments and options, in Markdown."""
    from typer.main import get_command

    from nanotron_fast.cli.commands import app
    from nanotron_fast.cli.examples import EXAMPLES
    from nanotron_fast.cli.help import names_of, usage_line

    group: Any = get_command(app)
    lines = ["# Commands", "", group.help, ""]
    for name, command in group.commands.items():
        lines += [f"## nanotron-fast {name}", ""]
        context = command.make_context(f"nanotron-fast {name}", [], resilient_parsing=True)
        usage = f"$ {usage_line(command, context)}"
        lines += ["```console", usage, "```", "", _paragraphs(command.help), ""]
        for each in _arguments(command):
            lines.append(f"- `{each.human_readable_name.upper()}`: {_cell(each.help)}")
        options = [each for each in command.params if each.param_type_name == "option"]
        if options:
            lines += ["", "| option | what it does | default |", "|---|---|---|"]
        for each in options:
            if getattr(each, "hidden", False):
                continue
            names = names_of(each).replace("|", "\\|")
            lines.append(f"| `{names}` | {_cell(each.help)} | {_default(each)} |")
        for example in EXAMPLES[name]:
            lines += ["", example.purpose, "", "```console", f"$ {example.command}", "```"]
        lines.append("")
    return "\n".join(lines)


def options_table(function: str) -> str:
    """The options that a function of the package takes as keywords, in Markdown."""
    from nanotron_fast.checkpoints import options

    choices = {
        "convert": options.Choices,
        "verify": options.VerifyChoices,
        "inspect": options.InspectChoices,
        "load_into": options.LoadChoices,
    }[function]
    lines = ["| keyword | what it says |", "|---|---|"]
    for name, option in options.described(choices).items():
        lines.append(f"| `{name}` | {_cell(option.help)} |")
    return "\n".join(lines)


def _arguments(command: Any) -> list[Any]:
    return [each for each in command.params if each.param_type_name == "argument"]


def _default(option: Any) -> str:
    shown = option.show_default
    if isinstance(shown, str):
        return shown
    if option.is_flag or option.default in (None, (), [], "") or callable(option.default):
        return ""
    return f"`{option.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def _paragraphs(text: str | None) -> str:
    return "\n".join(line.strip() for line in (text or "").replace("\b", "").splitlines())
