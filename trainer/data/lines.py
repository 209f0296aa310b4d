"""Files of text, line by line, packed or not; a file that is not text in UTF-8 is reported."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from trainer.data.problems import UNPACKING, Problem, Report, open_plain


def read_lines(path: Path, report: Report, keeps_blank: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines that are UTF-8, without their ends; blank ones only where asked for."""
    try:
        with open_plain(path) as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    if what := next((what for start, what in NO_TEXT.items() if raw.startswith(start)), None):
                        report(Problem(path, 0, "no text", f"this file is {what}, and no text; unpack it, or end its name so"))
                        return
                    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        sentence = "this file is UTF-16; convert it to UTF-8: iconv -f utf-16 -t utf-8 FILE > NEW"
                        report(Problem(path, 0, "not UTF-8", sentence))
                        return
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                line = _decoded(path, number, raw, report)
                if line is not None and (keeps_blank or line.strip()):
                    yield number, line
    except UNPACKING as error:
        report(_damaged(path, error))
    except OSError as error:
        unread = f"this file cannot be read ({error.strerror}); a data set needs it"
        report(Problem(path, 0, "missing", unread) if error.strerror else _damaged(path, error))


# What files begin with that are named as if they were text.
NO_TEXT = {b"\x1f\x8b": "a .gz", b"BZh9": "a .bz2", b"\xfd7zXZ": "an .xz", b"\x28\xb5\x2f\xfd": "a .zst"}
NO_TEXT |= {b"PK\x03\x04": "a .zip", b"PAR1": "a .parquet"}


def _decoded(path: Path, number: int, raw: bytes, report: Report) -> str | None:
    """Return a line as text, None if it is none."""
    try:
        line = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        sentence = f"byte {error.start + 1} of this line is not UTF-8; convert the file: iconv -f latin1 -t utf-8 FILE > NEW"
        report(Problem(path, number, "not UTF-8", sentence))
        return None
    if "\0" in line:
        report(Problem(path, number, "no text", "this line holds bytes of zero, so the file is no text in UTF-8; convert it"))
        return None
    return line


def _damaged(path: Path, error: Exception) -> Problem:
    what = "gzip file" if path.suffix == ".gz" else f"{path.suffix} file"
    return Problem(path, 0, "ends early", f"this {what} is cut off or damaged ({error}); copy it anew")
