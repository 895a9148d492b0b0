"""Import TensorFlow without its notes about oneDNN and CUDA, which no variable silences."""

import os
import sys
import tempfile


def import_tensorflow() -> None:
    """Import TensorFlow; what it writes to stderr meanwhile is shown only if the import fails."""
    if "tensorflow" in sys.modules:
        return
    # Otherwise the first process takes all of a GPU's memory, and a second stage finds none.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        # The notes come from C++, which bypasses Python's sys.stderr.
        os.dup2(notes.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        except BaseException:
            notes.seek(0)
            os.write(kept, notes.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
