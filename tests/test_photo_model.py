"""What a registered model takes, in Python and from MLflow's server; that it then predicts is test_pipeline.py's."""

import ast
import base64
import json

import numpy as np
import pandas as pd
import pytest
from test_photos import encoded, scene

from touchline.core.errors import TouchlineError
from touchline.data import photos
from touchline.models.photo_model import pixels
from touchline.tracking import runs

SIDE = 8
FILES = [encoded(scene(seed=number), "PNG") for number in range(2)]
DECODED = np.stack([photos.decode(content, SIDE) for content in FILES])
TEXTS = [base64.encodebytes(content).decode() for content in FILES]


@pytest.mark.parametrize(
    "given",
    [
        FILES, TEXTS, np.array(TEXTS), pd.Series(FILES), pd.DataFrame({"photo": FILES}), pd.DataFrame({"photo": TEXTS}),
        DECODED, DECODED.astype(int), DECODED.tolist(),
    ],
    ids=["bytes", "base64", "array of text", "column", "table", "table of text", "pixels", "wider", "JSON"],
)  # fmt: skip
def test_every_form_of_the_same_photos_gives_the_same_pixels(given) -> None:
    found = pixels(given, SIDE)
    assert found.dtype == np.uint8 and np.array_equal(found, DECODED)


def test_one_photo_needs_no_list() -> None:
    assert np.array_equal(pixels(FILES[0], SIDE), DECODED[:1]) and np.array_equal(pixels(TEXTS[1], SIDE), DECODED[1:])


def test_mlflows_server_hands_over_what_is_taken() -> None:
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    for body in ({"inputs": TEXTS}, {"dataframe_records": [{"photo": text} for text in TEXTS]},
                 {"dataframe_split": {"columns": ["photo"], "data": [[text] for text in TEXTS]}},
                 {"inputs": DECODED.tolist()}, {"instances": TEXTS}):  # fmt: skip
        assert np.array_equal(pixels(infer_and_parse_data(json.loads(json.dumps(body))), SIDE), DECODED), body.keys()


REFUSED = {
    "not an image": ([*FILES, b"text"], "photo 2"),
    "text": (["no base64!"], "photo 0"),
    "floats": (DECODED / 255, "255"),
    "shape": (DECODED[:, 1:], str(SIDE)),
    "too large": (DECODED.astype(int) + 1000, "255"),
    "two columns": (pd.DataFrame({"a": FILES, "b": FILES}), "2"),
    "mixed": ([*FILES, DECODED[0]], "base64"),
}


@pytest.mark.parametrize("given, named", REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_in_one_line(given, named: str) -> None:
    with pytest.raises(TouchlineError) as caught:
        pixels(given, SIDE)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_logged_model_carries_all_that_its_code_imports() -> None:
    carried = {f"touchline.{module}".replace("/", ".").removesuffix(".__init__") for module in runs.CODE}
    for module in runs.CODE:
        for node in ast.walk(ast.parse((runs.PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("touchline"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert node.module in carried or names <= carried, (module, node.module)
