"""The model file that every stage reads and writes: its format, its network, its training state."""

from checkpoint.model_file import (
    Checkpoint,
    CheckpointError,
    check_content,
    in_memory,
    in_short,
    load,
    read,
    save,
    write,
)
from checkpoint.network import (
    check_readable,
    further,
    load_further,
    load_state,
    open_model,
    rebuild,
    scoring_network,
    snapshot,
    vocabulary_of,
)
