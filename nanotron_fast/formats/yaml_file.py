"""Reading a YAML document from a checkpoint: the configuration of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.plain_file import read_small

# Nanotron's own are nested about six deep.
_MAX_DEPTH = 64
# What PyYAML raises of a value that its tag does not fit, such as `!!bool x`, beside its own.
_OF_VALUES = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)


def read_yaml(path: Path) -> Any:
    """The document in a file. Raises CheckpointError, which names the file, or OSError."""
    import yaml

    # The parser in C, where PyYAML was built with it: in Python alone, to parse this one file takes
    # longer than all the rest of a plan. It ends the process where a document is nested too
    # deeply, so that is looked at first, in events, which it makes without recursion.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = read_small(path).decode("utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise CheckpointError(f"{path}: nested more than {_MAX_DEPTH} deep")
        return yaml.load(text, Loader=loader)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None
    except CheckpointError:
        raise
    except (yaml.YAMLError, *_OF_VALUES) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: not YAML: {reason}") from None
