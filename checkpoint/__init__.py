"""The model file that every stage reads and writes: its format, its checks, its model."""

from checkpoint.model_file import (
    Checkpoint,
    CheckpointError,
    check_writable,
    copy,
    in_memory,
    load,
    same_file,
    save,
)
from checkpoint.rebuild import (
    config_of,
    load_state,
    made_of,
    plain_name,
    rebuild,
    snapshot,
    vocabulary_of,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_writable",
    "config_of",
    "copy",
    "in_memory",
    "load",
    "load_state",
    "made_of",
    "plain_name",
    "rebuild",
    "same_file",
    "save",
    "snapshot",
    "vocabulary_of",
]
