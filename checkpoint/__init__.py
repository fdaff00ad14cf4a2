"""The model file that every stage reads and writes: its format, its network, its training state."""

from checkpoint.model_file import (
    Checkpoint,
    CheckpointError,
    check_content,
    check_writable,
    copy,
    in_memory,
    load,
    save,
)
from checkpoint.network import (
    check_readable,
    further,
    load_further,
    load_state,
    open_model,
    rebuild,
    snapshot,
    vocabulary_of,
)
