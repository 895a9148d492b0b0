"""Import TensorFlow without its notes about oneDNN and CUDA, which no variable silences."""

import os
import sys
import tempfile
from functools import cache

from touchline.core.errors import TouchlineError


@cache
def import_tensorflow() -> None:
    """Import TensorFlow, and Keras on it; what they write to stderr meanwhile is shown only if an import fails.

    Keras is set as our models need it, whatever the user's `KERAS_BACKEND` and `~/.keras/keras.json` say.

    Raises:
        TouchlineError: another program of this process has started Keras on something else.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "tensorflow"
    # Otherwise the first process takes all of a GPU's memory, and a second stage finds none.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        # The notes come from C++, which bypasses Python's sys.stderr.
        os.dup2(notes.fileno(), 2)
        try:
            import keras
            import tensorflow  # noqa: F401
        except BaseException:
            notes.seek(0)
            os.write(kept, notes.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    if (backend := keras.config.backend()) != "tensorflow":
        raise TouchlineError(f"Keras runs on {backend} already: set KERAS_BACKEND=tensorflow before it is imported")
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
