"""What a caller may choose about a conversion: each option is one field of `Options`.

The command line makes a flag of each field, the functions take it as a keyword, and both hand what
they were given to `Options.of`, which checks it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar, get_type_hints

from nanotron_fast.checkpoints import option_values
from nanotron_fast.errors import ConfigError
from nanotron_fast.model.ranks import Ranks
from nanotron_fast.model.topology import Topology, topology_wanted

if TYPE_CHECKING:
    from nanotron_fast.moves.dtypes import Dtype

DEFAULT_SHARD_BYTES = 5 * 10**9
# Said where there are more tensors than a model has.
IGNORE_HINT = "--ignore-tensors GLOB leaves out what is not wanted"
# Headings under which help lists what is not most often needed.
FILES = "Tensors and files"
DETAILS = "Nanotron's details"
_MAX_ROWS = 2**31

Way = Literal["nanotron", "hf", "resharding", "dcp", "renaming"]
# What a conversion may do, in the words of a message.
WAYS: Mapping[Way, str] = {
    "nanotron": "writing a Nanotron checkpoint",
    "hf": "writing a Hugging Face checkpoint",
    "resharding": "writing a Nanotron checkpoint at another topology",
    "dcp": "writing a checkpoint of torch.distributed.checkpoint",
    "renaming": "no Nanotron checkpoint is read or written",
}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def spelled(name: str) -> str:
    """An option's name as the command line has it: "--vocab-size"."""
    return f"--{name.replace('_', '-')}"


def _as_given(flag: str, given: Any) -> Any:
    return given


class Option(NamedTuple):
    """What is said of an option beside its name and type.

    Args:
        default: of the field, checked. None means: decided from the source.
        help: for the command line and for the functions.
        written: the default as a caller writes it, where that is something else.
        check: from the flag's name and what a caller gives to what the field holds. Raises
            ConfigError or CheckpointError.
        ways: of converting, in which it has a meaning.
        metavar: what the command line calls the value; by default its type.
        group: the heading that help lists it under; None with the options that most need.
        values: all that the value may be, for a shell to complete.
        parts: attributes of the value that are flags of their own, and the help of each.
    """

    default: Any
    help: str
    written: str | None = None
    check: Callable[[str, Any], Any] = _as_given
    ways: tuple[Way, ...] = tuple(WAYS)
    metavar: str | None = None
    group: str | None = None
    values: Callable[[], Sequence[str]] | None = None
    parts: Mapping[str, str] = MappingProxyType({})


class InspectChoices(TypedDict, total=False):
    """The options of `inspect`, as a caller gives them. The first type of a union is a flag's."""

    family: str | None
    rope_interleaved: bool | None
    like: str | Path | None


class VerifyChoices(InspectChoices, total=False):
    """Those of `verify`."""

    ignore_tensors: Sequence[str]


class LoadChoices(VerifyChoices, total=False):
    """Those of `load_into`."""

    model_class: str
    target: str | None
    checkpoint_version: str | None
    pad_vocab_to_multiple_of: int | None


class Choices(LoadChoices, total=False):
    """Those of `convert` and `plan`: all of them."""

    to: str | None
    topology: Topology | None
    dtype: str
    vocab_size: int | None
    max_shard_size: str | int | None
    names: str
    master_weights: bool
    tokenizer: str | Path | None
    ranks_only: Sequence[str]


def _one_of(values: Callable[[], Sequence[str]]) -> Callable[[str, str], str]:
    """A check that a value is one of those, which are asked for then."""

    def check(flag: str, given: str) -> str:
        if given not in (allowed := values()):
            raise ConfigError(f"{flag} {given}: choose {' or '.join(allowed)}")
        return given

    return check


def _topology(flag: str, given: object) -> Topology:
    if not isinstance(given, Topology):
        raise ConfigError(topology_wanted(given))
    return given


def _dtype(flag: str, given: str) -> Dtype | None:
    from nanotron_fast.moves.dtypes import parse_cast

    return parse_cast(given)


def _family(flag: str, given: str) -> str:
    from nanotron_fast.families import family_named

    return family_named(given).name


def _rows(flag: str, given: int) -> int:
    if not 1 <= given <= _MAX_ROWS:
        bound = "at least 1" if given < 1 else f"at most {_MAX_ROWS}"
        raise ConfigError(f"{flag} {given}: it should be {bound}")
    return given


def _shard_bytes(flag: str, given: str | int) -> int:
    from nanotron_fast.units import parse_size

    return parse_size(given, flag)


def _folder(flag: str, given: str | Path) -> Path:
    from nanotron_fast.checkpoints.source import resolve_companions

    return resolve_companions(given, flag)


def _patterns(flag: str, given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field of `Options`, described as `Option` says."""
    return field(default=default, metadata={"option": Option(default, help, **more)})


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of a caller, checked, in the order in which the command line lists them."""

    to: str | None = _option(
        None,
        "nanotron, hf, or dcp (torch.distributed.checkpoint); a Nanotron SRC can be written to "
        "nanotron at another topology. (default: hf for a Nanotron SRC, else nanotron)",
        check=_one_of(option_values.formats),
        metavar="FORMAT",
        values=option_values.formats,
    )
    topology: Topology = _option(
        Topology(),
        "Sizes of the tensor-, pipeline- and expert-parallel groups to write for.",
        check=_topology,
        ways=("nanotron", "resharding"),
        parts={
            "tp": "Tensor-parallel ranks to write for.",
            "pp": "Pipeline stages to write for.",
            "ep": "Ranks to split experts over, for this package's own class.",
        },
    )
    # What values are cast to.
    dtype: Dtype | None = _option(
        None,
        "keep, bf16, fp16 or fp32; a router stays fp32 in Nanotron.",
        written="keep",
        check=_dtype,
        metavar="DTYPE",
        values=option_values.dtypes,
        ways=("nanotron", "hf", "dcp", "renaming"),
    )
    model_class: str = _option(
        "auto",
        "Nanotron's class: auto, llama, qwen2 or starcoder2; or nanotron-fast, this package's own.",
        ways=("nanotron",),
        metavar="CLASS",
        group=DETAILS,
        values=option_values.classes,
    )
    family: str | None = _option(
        None,
        "Overrule the family that the config names.",
        check=_family,
        metavar="NAME",
        group=DETAILS,
        values=option_values.families,
    )
    target: str | None = _option(
        None,
        "nanotron refuses what stock Nanotron computes wrongly; nanotron-fast admits "
        "rope_scaling, for the drop-in, and what Nanotron's classes cannot hold (a head_dim of its "
        "own, biases, windows on some layers), or not over so many ranks (copies of key-value "
        "heads where TP outnumbers them), for nanotron-fast train. "
        "(default: nanotron, where one of its classes holds the family)",
        check=_one_of(option_values.targets),
        metavar="NAME",
        group=DETAILS,
        values=option_values.targets,
        ways=("nanotron", "hf", "dcp"),
    )
    # To Nanotron: the layout to write. From it: the layout that is there, whatever its config says.
    rope_interleaved: bool | None = _option(
        None,
        "Rotary pairs lie beside each other in q and k, or half a head apart: what to write "
        "for Nanotron, and what to read from it. (default: halves; what its config says)",
        ways=("nanotron", "hf", "dcp"),
        group=DETAILS,
    )
    checkpoint_version: str | None = _option(
        None,
        "1.5 (Nanotron main) or 1.2 (PyPI's 0.4). (default: 1.5)",
        check=_one_of(option_values.versions),
        metavar="VERSION",
        group=DETAILS,
        values=option_values.versions,
        ways=("nanotron", "hf", "dcp"),
    )
    pad_vocab_to_multiple_of: int | None = _option(
        None,
        "Add zero rows to embedding and head.",
        check=_rows,
        ways=("nanotron",),
        group=DETAILS,
    )
    vocab_size: int | None = _option(
        None,
        "Rows of a padded vocabulary to keep outside of Nanotron.",
        check=_rows,
        group=DETAILS,
        ways=("hf", "dcp"),
    )
    # In bytes.
    max_shard_size: int | None = _option(
        None,
        "The most bytes of a Hugging Face or DCP file, in decimal units. (default: 5GB)",
        check=_shard_bytes,
        metavar="SIZE",
        group=FILES,
        ways=("hf", "dcp", "renaming"),
    )
    # One of "hf" and torchtitan.NAMINGS.
    names: str = _option(
        "hf",
        "Whose names tensors get in a DCP checkpoint: hf, torchtitan, or torchtitan-0.2 (those it "
        "gave until then); with torchtitan's, rows of wq and wk are in its order.",
        check=_one_of(option_values.namings),
        metavar="WHOSE",
        group=FILES,
        values=option_values.namings,
        ways=("dcp", "renaming"),
    )
    master_weights: bool = _option(
        False,
        "Write the fp32 masters of a training, which its optimizer keeps, and not the weights that "
        "were rounded from them.",
        group=FILES,
        ways=("hf", "dcp"),
    )
    tokenizer: Path | None = _option(
        None,
        "Take the tokenizer from this directory, Hub id or URL, not from SRC.",
        check=_folder,
        metavar="DIR_OR_ID",
    )
    like: Path | None = _option(
        None,
        "The Hugging Face model that a Nanotron checkpoint was made from, or one of the shape of a "
        "DCP checkpoint: its configuration, vocabulary size, generation_config and tokenizer are "
        "taken.",
        check=_folder,
        ways=("nanotron", "hf", "dcp", "renaming"),
        metavar="DIR_OR_ID",
    )
    ranks_only: Ranks | None = _option(
        None,
        "Write only what some ranks need, as pp=1 or tp=0-3: for a machine with a disk of its own. "
        "May be given several times.",
        check=Ranks.parse,
        ways=("nanotron", "resharding"),
        metavar="AXIS=RANKS",
        group=FILES,
    )
    ignore_tensors: tuple[str, ...] = _option(
        (),
        "Leave out tensors with such names, as 'v_head.*'. May be given several times.",
        check=_patterns,
        metavar="GLOB",
        group=FILES,
    )

    @classmethod
    def of(cls, given: Mapping[str, object], among: type = Choices) -> Options:
        """Checks what a caller gives for the options `among`; None stands for the default.

        Raises ConfigError, CheckpointError; MissingPackageError for a URL that cannot be reached,
        whatever the other options are; TypeError where an option is not among them.
        """
        from nanotron_fast.checkpoints.remote.packages import require_store

        known = described(among)
        check_keywords(given, known)
        require_store(*(value for name, value in given.items() if known[name].check is _folder))
        return cls(
            **{
                name: known[name].check(spelled(name), value)
                for name, value in given.items()
                if value is not None
            }
        )

    def reject_for(self, way: Way) -> None:
        """Refuses choices that mean nothing in a way of converting. Raises ConfigError."""
        for name, option in described().items():
            value = getattr(self, name)
            if option.parts:
                given = [
                    part
                    for part in option.parts
                    if getattr(value, part) != getattr(option.default, part)
                ]
            else:
                given = [name] if value != option.default else []
            if given and way not in option.ways:
                raise ConfigError(f"{spelled(given[0])}: it has no meaning when {WAYS[way]}")


def reject_like(options: Options) -> None:
    """Refuses --like for a model that has its own configuration. Raises ConfigError."""
    if options.like is not None:
        raise ConfigError("--like: it has no meaning for a Hugging Face checkpoint")


def described(among: type = Choices) -> dict[str, Option]:
    """The options of a class such as `VerifyChoices`, by name, in the order of the fields."""
    return {
        each.name: each.metadata["option"]
        for each in fields(Options)
        if each.name in among.__annotations__
    }


def check_keywords(given: Iterable[str], known: Collection[str]) -> None:
    """Raises TypeError where one is not known, with what may have been meant and all there are."""
    for name in given:
        if name not in known:
            from nanotron_fast.words import meant

            raise TypeError(
                f"unexpected keyword argument {name!r}{meant(name, known) or ';'} "
                f"the keywords are {', '.join(known)}"
            )


def takes(among: type) -> Callable[[_Function], _Function]:
    """Shows options in the signature and the docstring of a function whose `**choices` they are.

    A keyword that is neither an option nor a parameter of the function is refused: TypeError.
    """
    from textwrap import fill

    types = get_type_hints(among)

    def show(function: _Function) -> _Function:
        signature = inspect.signature(function)
        *parameters, choices = signature.parameters.values()
        options = [
            choices.replace(
                name=name,
                kind=choices.KEYWORD_ONLY,
                default=option.written or option.default,
                annotation=types[name],
            )
            for name, option in described(among).items()
        ]
        shown = signature.replace(parameters=[*parameters, *options])
        helps = [
            fill(f"{name}: {option.help}", 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
            for name, option in described(among).items()
        ]
        text = inspect.cleandoc(function.__doc__ or "")

        @wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            check_keywords(given, shown.parameters)
            return function(*args, **given)

        checked.__doc__ = "\n".join((text, "", "Options:", *helps))
        checked.__signature__ = shown  # type: ignore[attr-defined]
        annotations = {**function.__annotations__, **types}
        del annotations[choices.name]
        checked.__annotations__ = annotations
        return checked  # type: ignore[return-value]

    return show
