"""Read files that other people made: only regular files, text in UTF-8, JSON with unique keys and finite numbers."""

import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from prismer.errors import InputError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_JSON_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}
_REMEDY = "correct it, or restore it from a copy"
# str.splitlines also splits at form feeds, U+0085 and U+2028, which occur in captions from the web
_LINE_END = re.compile(r"\r\n|\n|\r")


class RepeatedKeys(dict):
    """A JSON object that gives one of its keys twice, so its meaning is ambiguous."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading. Anything else is refused: a named pipe could block, a device never end.

    Raises:
        OSError: if the file cannot be opened, or is a named pipe, a socket, a device or a folder.
    """
    if "\0" in os.fspath(path):
        raise OSError(errno.EINVAL, "no file has zero bytes in its name", str(path).replace("\0", "\\0"))
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        what = f"it is {_KINDS.get(kind, 'no file')}, not a file; name a file"
        raise OSError(errno.EINVAL, what, str(path))
    # O_NONBLOCK: if a pipe has taken the name since, opening it would wait for a writer
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_bytes(path: str | os.PathLike, offset: int = 0, size: int = -1, limit: int | None = None) -> bytes:
    """The bytes of a file, or `size` bytes from `offset`.

    Args:
        path: a regular file.
        offset, size: which bytes; size -1 reads to the end.
        limit: the most bytes to accept; None accepts any number.

    Raises:
        OSError: as `open_regular`, or if there are more than `limit` bytes.
        EOFError: if the file ends too early.
    """
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size - offset if size < 0 else size
        if limit is not None and length > limit:
            raise OSError(errno.EOVERFLOW, f"{length} bytes are more than {limit} can be", str(path))
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{path} ends {size - len(data)} bytes too early")
    return data


def decode_text(data: bytes, name: object, remedy: str = "save it as UTF-8") -> str:
    """Decode UTF-8 text, with or without a byte-order mark.

    Args:
        data: its bytes.
        name: the name of the text in errors.
        remedy: the advice in errors.

    Raises:
        ValueError: if it is not UTF-8 or holds zero bytes.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); {remedy}") from None
    if "\0" in text:
        raise InputError(f"{name} is not UTF-8 text (it holds zero bytes); {remedy}")
    return text


def lines_of(text: str) -> list[str]:
    r"""Split a text into lines, at \n, \r\n and \r only."""
    lines = _LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def parse_json(data: bytes | str, name: object, remedy: str = _REMEDY, *, lenient: bool = False) -> Any:
    """The JSON value of a text, or of its UTF-8 bytes with or without a byte-order mark.

    Args:
        data: the text or its bytes.
        name: the name of the text in errors.
        remedy: the advice in errors.
        lenient: accept numbers that are not finite, and objects that give a key twice as `RepeatedKeys`, so that the
            caller can refuse single entries of a long list.

    Raises:
        ValueError: if it is not UTF-8 or not JSON, is nested too deeply, or (unless lenient) holds such a number or
            object.
    """
    text = decode_text(data, name, remedy) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    strict = {} if lenient else dict(parse_constant=_refuse_constant, parse_float=_finite)
    try:
        return json.loads(text, object_pairs_hook=_mark_repeated if lenient else _refuse_repeated, **strict)
    except RecursionError:
        raise InputError(f"{name} is not JSON (it is nested too deeply); {remedy}") from None
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error}); {remedy}") from None


def read_json(path: str | Path, kind: type | None = None, remedy: str = _REMEDY, *, lenient: bool = False) -> Any:
    """The JSON value of a UTF-8 file.

    Args:
        path: a regular file.
        kind: the type that the value must have: dict, list, ...; None accepts any.
        remedy, lenient: as in `parse_json`.

    Raises:
        ValueError: if the file is missing, cannot be read, or holds something else.
    """
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    value = parse_json(data, path, remedy, lenient=lenient)
    if kind is not None and type(value) is not kind:
        found = _JSON_KINDS.get(type(value), "null")
        raise InputError(f"{path} holds {found}, not {_JSON_KINDS[kind]}; {remedy}")
    return value


def is_text(value: str) -> bool:
    """Whether `value` can be written as UTF-8; strings from JSON may hold lone surrogates, which cannot."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: if the file cannot be read or is not UTF-8.
    """
    try:
        return decode_text(read_bytes(path), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 file, without line ends; see `lines_of`.

    Raises:
        ValueError: as `read_text`.
    """
    return lines_of(read_text(path))


def printable(text: str) -> str:
    r"""Make a text encodable as UTF-8: lone surrogates, such as stand for bad bytes of a file name, become \udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def _mark_repeated(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(found)


def _refuse_repeated(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"it gives the key {twice!r} twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InputError(f"{text} is too large")
    return value
