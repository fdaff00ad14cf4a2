"""The model file that every stage reads and writes: its format, its checks, its model."""

from checkpoint.model_file import (
    Checkpoint,
    CheckpointError,
    check_readable,
    check_writable,
    copy,
    in_memory,
    load,
    rebuild,
    save,
)
from checkpoint.parts import (
    config_of,
    load_state,
    plain_name,
    sizes_only,
    skeleton,
    snapshot,
    vocabulary_of,
)
