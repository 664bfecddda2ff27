"""The exceptions that nanotron_fast raises on purpose. They end the command with exit code 2."""


def add_note(error: BaseException, text: str) -> None:
    """Says more of an error, on a line of its own, as Python 3.11's `add_note` does."""
    error.__notes__ = [*notes_of(error), text]


def notes_of(error: BaseException) -> tuple[str, ...]:
    """What `add_note` has said of it."""
    return tuple(getattr(error, "__notes__", ()))


def printable(text: str) -> str:
    """A text in which what is no character to print is its escape, such as `\\n`.

    Names and values that others have written are told as they are, and may hold anything.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def one_line(error: BaseException) -> str:
    """What a command prints of an error.

    What the system says of a file comes after the file's name, without its number.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([*([" -> ".join(files)] if files else []), error.strerror])
    return printable(text)


class NanotronFastError(Exception):
    """Base of every error below."""


class CheckpointError(NanotronFastError, ValueError):
    """A checkpoint's files are missing, malformed, or contradict each other."""


class PartialCheckpointError(CheckpointError):
    """A checkpoint holds what some ranks need alone, and more is asked of it."""


class UnmovableError(CheckpointError):
    """Shards make sense, but moves cannot join them: slices have steps, or shards overlap."""


class ConfigError(NanotronFastError, ValueError):
    """A configuration lacks a key, or has a value that makes no sense."""


class DataError(NanotronFastError, ValueError):
    """What a model is to be trained on is missing, malformed, or not for this model."""


class TrainingError(NanotronFastError):
    """A run cannot go on: its loss is no number any more."""


class UnsupportedModelError(NanotronFastError, ValueError):
    """The other format cannot express this model, or would compute something else with it."""


class TopologyError(NanotronFastError, ValueError):
    """A tensor or a model does not divide over the ranks that were asked for."""


class DestinationError(NanotronFastError, OSError):
    """The destination cannot be written without losing something."""


class MissingPackageError(NanotronFastError, ImportError):
    """A package that only some uses need is not installed, or does not fit; how to have it."""


class PlanError(NanotronFastError, ValueError):
    """A plan contradicts itself or the files it speaks of."""


def puts_in_doubt(error: BaseException | None) -> bool:
    """Whether what was written before an error may be wrong: its source, or its plan, is."""
    return isinstance(error, CheckpointError | PlanError)


class Cancelled(NanotronFastError):
    """The run was asked to stop."""
