"""Change values of params by dotted key (`models.cnn.dropout`), in the file and in plain content.

In the file every other character stays: a YAML library that rewrites the whole file would lose the user's layout.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline.core import params
from touchline.core.errors import ParamsError
from touchline.core.files import write_text

if TYPE_CHECKING:
    from ruamel.yaml.nodes import MappingNode, Node


class Source(str):
    """The YAML of an entry as in a file, with its key and comments; its first line is not indented."""

    __slots__ = ()


def change(content: dict[str, Any], key: str, value: Any) -> bool:
    """Change one value of plain content in place; return False, and change nothing, if it has no such key."""
    *sections, last = key.split(".")
    section: Any = content
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        return False
    section[last] = value
    return True


def set_values(file: Path, changes: Mapping[str, Any]) -> None:
    """Change values of params.yaml, and no other character.

    Args:
        changes: by dotted key, a value; or the `Source` of an entry in a section in block style, which replaces the
            entry of that name, comments included, or is added.

    Raises:
        ParamsError: the file or the result would be invalid, or the values are shared by anchors; nothing is
            written.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    params.load(file)
    text = file.read_bytes().decode()
    # Copied through JSON, so that a value shared by an anchor does not change in two places.
    wanted, root = json.loads(json.dumps(_read(text))), YAML(pure=True).compose(text)
    spots = []
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = reduce(getitem, sections, wanted)
        before, section[last] = section.get(last), _read(value)[last] if isinstance(value, Source) else value
        if section[last] != before:
            spots.append(_spot(text, root, key, value))
    params.check(wanted, file.name)
    for start, end, new in sorted(spots, reverse=True):
        text = text[:start] + new + text[end:]
    try:
        right = _read(text) == wanted
    except YAMLError:  # the replaced text held an anchor that is used elsewhere
        right = False
    if not right:
        raise _by_hand()
    write_text(file, text)


def remove_entries(file: Path, keys: Collection[str]) -> None:
    """Remove entries from sections of params.yaml, and change nothing else; missing entries are ignored.

    Raises:
        ParamsError: as `set_values`.
    """
    from ruamel.yaml import YAML

    params.load(file)
    text = file.read_bytes().decode()
    wanted, root = json.loads(json.dumps(_read(text))), YAML(pure=True).compose(text)
    spots = []
    for key in keys:
        section, name = key.split(".")
        if name in wanted[section]:
            del wanted[section][name]
            start, end = _lines(text, *_below(_below(root, section)[1], name))
            spots.append((text.rindex("\n", 0, start), end))
    params.check(wanted, file.name)
    for start, end in sorted(spots, reverse=True):
        text = text[:start] + text[end:]
    if _read(text) != wanted:
        raise _by_hand()
    write_text(file, text)


def entries(text: str) -> dict[str, Source]:
    """Each entry of each section, by dotted key: `models.cnn`."""
    from ruamel.yaml import YAML

    found = {}
    for name, below in YAML(pure=True).compose(text).value:
        for key, value in below.value:
            start, end = _lines(text, key, value)
            found[f"{name.value}.{key.value}"] = Source(_moved(text[start:end], -key.start_mark.column))
    return found


def as_yaml(value: Any) -> str:
    """A value as YAML and as `dvc exp run -S` takes it; no exponents, which parsers read in different ways."""
    import numpy as np

    match value:
        case list():
            return f"[{', '.join(map(as_yaml, value))}]"
        case float():
            return np.format_float_positional(value, trim="0")
        case str():
            return value if re.fullmatch(r"[\w./-]+", value) and _read(value) == value else json.dumps(value)
        case _:
            return json.dumps(value)


def _read(text: str) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def _by_hand() -> ParamsError:
    return ParamsError(
        "params.yaml shares values by anchors or merges, or has a section on one line: change the values by hand"
    )


def _spot(text: str, root: "MappingNode", key: str, value: Any) -> tuple[int, int, str]:
    """Where in `text` the new value goes (start, end), and its text."""
    *sections, last = key.split(".")
    parent: Any = root
    for name in sections:
        parent = _below(parent, name)[1]
    if isinstance(value, Source):
        if parent.flow_style:
            raise _by_hand()
        newline = "\r\n" if "\r\n" in text else "\n"
        names = [name.value for name, _ in parent.value]
        start, end = _lines(text, *(_below(parent, last) if last in names else parent.value[-1]))
        new = _moved(value, _column(parent)).replace("\n", newline)
        return (start, end, new) if last in names else (end, end, f"{newline}{' ' * _column(parent)}{new}")
    node = _below(parent, last)[1]
    start, end = node.start_mark.index, node.end_mark.index
    # A block list ends where the next key begins.
    return start, len(text[:end].rstrip()), as_yaml(value)


def _below(node: "Node", name: str) -> tuple["Node", "Node"]:
    """The key and the value of an entry; a merged one has none here."""
    for key, value in node.value:
        if key.value == name:
            return key, value
    raise _by_hand()


def _column(parent: "MappingNode") -> int:
    return parent.value[0][0].start_mark.column


def _lines(text: str, key: "Node", value: "Node") -> tuple[int, int]:
    """From the key of an entry to the end of its last line, comment included."""
    last: Any = value
    while not (isinstance(last.value, str) or last.flow_style) and last.value:
        last = last.value[-1][1] if isinstance(last.value[-1], tuple) else last.value[-1]
    start, end = key.start_mark.index, len(text[: last.end_mark.index].rstrip())
    if end < start:  # the value is an alias of one before it
        raise _by_hand()
    return start, end + len(text[end:].split("\n", 1)[0].rstrip("\r"))


def _moved(source: str, columns: int) -> str:
    """The text with the lines after the first moved right (or left) by so many columns."""
    first, *others = source.splitlines()
    moved = [(" " * columns + line if columns > 0 else line[-columns:]) if line.strip() else line for line in others]
    return "\n".join([first, *moved])
