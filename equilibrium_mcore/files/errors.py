"""Errors of the operating system in words: which file or folder, what failed, and a way out.

Python's own text is `[Errno 28] No space left on device`, often without the file: a stream does not
tell its name when a write fails. `naming(path)` adds it where something is written, `in_words`
says it where a command ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

AGAIN = "then give the same command again"
# What failed, and a way out, by the error's number.
_WORDS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: (
        "no room is left on its file system{room}",
        f"remove what is not needed there, or name a folder on another disk; {AGAIN}",
    ),
    errno.EDQUOT: (
        "your quota on its file system is used up{room}",
        f"remove files of yours there, or ask for more; {AGAIN}",
    ),
    errno.EFBIG: (
        "it would be larger than its file system or a limit (ulimit -f) allows",
        f"raise the limit, or name a folder elsewhere; {AGAIN}",
    ),
    errno.EROFS: (
        "its file system is read-only",
        "name another folder, or have it mounted for writing (after a fault of the disk the "
        "kernel makes it read-only: see dmesg)",
    ),
    errno.EACCES: ("permission is denied", "give yourself the permission, or name another path"),
    errno.EPERM: ("the operation is not permitted", "see its owner and mode, or name another path"),
    errno.ENOENT: ("it is not there", "see the path; if something removed it, bring it back"),
    errno.ENOTDIR: (
        "a part of this path is a file where a folder is needed",
        "remove or rename that file, or name another path",
    ),
    errno.EISDIR: (
        "it is a folder where a file is needed",
        "remove or rename that folder, or name another path",
    ),
    errno.EEXIST: ("it is there already", "remove or rename it, or name another path"),
    errno.ENOTEMPTY: ("the folder is not empty", "see who writes there, or name another path"),
    errno.ENAMETOOLONG: (
        "the name is longer than its file system allows",
        "name a shorter path",
    ),
    errno.ELOOP: ("symbolic links go round in a circle", "mend the link, or name another path"),
    errno.EMFILE: (
        "this process has too many open files",
        f"raise the limit (ulimit -n); {AGAIN}",
    ),
    errno.ENFILE: ("the host has too many open files", f"end what holds them; {AGAIN}"),
    errno.EIO: (
        "the disk or file server gave an input/output error",
        "see dmesg, and copy what matters to another disk before you go on",
    ),
    errno.ESTALE: (
        "the file server does not know it any more (stale handle)",
        f"see that the folder is there and mounted; {AGAIN}",
    ),
    errno.ENODEV: ("its device is gone", f"see that it is mounted; {AGAIN}"),
    errno.ENXIO: ("its device is gone", f"see that it is mounted; {AGAIN}"),
    errno.ETIMEDOUT: ("its file server does not answer", f"see that it is up; {AGAIN}"),
    errno.ENOMEM: ("no memory is left", "use fewer processes, or a host with more memory"),
    errno.EBUSY: ("it is in use", f"end what uses it, or name another path; {AGAIN}"),
    errno.EXDEV: ("it lies on another file system", "name a path on the same one"),
    errno.EINVAL: (
        "its file system refuses the operation",
        "name a path on another file system",
    ),
}
_FULL_BYTES = 1 << 20  # less is no room for a file of a library's
UNNAMED = "a file or folder that the library did not name"


class FileContentError(OSError, ValueError):
    """A file does not hold what it should, or changed under its reader; the text says which."""


def in_words(error: OSError) -> str:
    """The file, what failed, and a way out; the error's own text where it was raised with one."""
    if error.errno is None:
        _, found, inner = str(error).rpartition(f"{type(error).__name__}: ")
        # torch's loader puts the traceback of its process into the text.
        return inner.strip() if found and "Original Traceback" in str(error) else str(error)
    names = [os.fsdecode(name) for name in _names(error)]
    known = _WORDS.get(error.errno)
    if known is None or not names and isinstance(error, ConnectionError):
        return f"{' -> '.join(names)}: {error.strerror}" if names else str(error)
    what, way_out = known
    what = what.format(room=_room(names[-1]) if names else "")
    text = error.strerror or os.strerror(error.errno)
    return f"{' -> '.join(names) or UNNAMED}: {what} ({text}): {way_out}"


def reason(error: BaseException) -> str:
    """Why a file that the message names already cannot be read: a line, without a class's name."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is no UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} is no JSON ({error.msg})"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno)
    if isinstance(error, KeyError):
        return f"it has no {error}"
    if isinstance(error, TypeError | AttributeError):
        return "its keys or values are others"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return first[:200] or "its content is another"


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the operating system from inside names `path`, if it names nothing itself.

    Libraries that hide one in the text of an error of their own are seen through.
    """
    try:
        yield
    except OSError as error:
        raise named(error, path) from None
    except Exception as error:
        if (code := _hidden_number(str(error), path)) is None:
            raise
        raise OSError(code, os.strerror(code), os.fspath(path)) from None


def refusal_behind(error: BaseException) -> OSError | None:
    """What the operating system refused, where an error is that or `pathlib`'s word for it."""
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    if isinstance(cause, OSError) and (cause is error or cause.errno == errno.ELOOP):
        return cause
    return None


def told_in_words(error: BaseException) -> str | None:
    """The message of an error that says by itself what to do; None for a fault that needs a stack.

    What the operating system refused; values that are not finite, which are the run's and not the
    program's; and errors of classes that say so by `is_told`.
    """
    if (refusal := refusal_behind(error)) is not None:
        return in_words(refusal)
    if isinstance(error, FloatingPointError) or getattr(error, "is_told", False):
        return str(error)
    return None


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error; with `path` where it names no file."""
    if error.errno is None or error.filename is not None:
        return error
    return type(error)(error.errno, error.strerror or os.strerror(error.errno), os.fspath(path))


def _hidden_number(text: str, path: str | os.PathLike[str]) -> int | None:
    """The number of an error that a library put into words, while it wrote `path`."""
    if rust := re.search(r"\(os error (\d+)\)", text):  # safetensors, tokenizers
        return int(rust[1])
    if text.startswith("Parent directory") and text.rstrip(".").endswith("does not exist"):
        return errno.ENOENT  # torch
    if "inline_container" not in text and "PytorchStreamWriter" not in text:
        return None
    for code in _WORDS:  # torch's writer, where a file cannot be opened
        if os.strerror(code) in text:
            return code
    with contextlib.suppress(OSError):  # it says no more than `file write failed`
        if shutil.disk_usage(_nearest(path)).free < _FULL_BYTES:
            return errno.ENOSPC
    return errno.EIO


def _nearest(path: str | os.PathLike[str]) -> Path:
    """The path, or the first folder above it that is there."""
    whole = Path(path).absolute()
    return next(place for place in (whole, *whole.parents) if os.path.exists(place))


def _names(error: OSError) -> list[str | bytes]:
    names = (error.filename, error.filename2)
    return [os.fspath(name) for name in names if isinstance(name, str | bytes | os.PathLike)]


def _room(name: str) -> str:
    """Free and all bytes of the file system of a path that may not be there."""
    with contextlib.suppress(OSError, ValueError):
        usage = shutil.disk_usage(_nearest(name))
        return f", {_size(usage.free)} of {_size(usage.total)} are free"
    return ""


def _size(count: int) -> str:
    unit = next((u for u in (10**9, 10**6, 10**3) if count >= u), 1)
    name = {10**9: "GB", 10**6: "MB", 10**3: "kB", 1: "bytes"}[unit]
    return f"{count / unit:.3g} {name}"
