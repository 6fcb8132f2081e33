"""The rows of .parquet and .arrow files.  No other module imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vp_train.config import ConfigError
from vp_train.data.files import INSTALL, refused
from vp_train.data.left_out import NOT_UTF8, TOO_LONG, LeftOut
from vp_train.durable import UnreadableError, open_regular

_BATCH = 1 << 24  # bytes of text that are read together, as far as the file says its sizes
_MOST_ROWS = 1_024  # that are read together
LONGEST_VALUE = 1 << 28  # bytes of a text


def rows(path: Path, kind: str, field: str, left_out: LeftOut) -> Iterator[tuple[str, object]]:
    """Yield the origin and the value of column `field` of every row, from 1.

    kind: `parquet`, or `arrow`: record batches as a stream, which `datasets` writes, or as a file.
    Texts that are not UTF-8 or too long are counted in `left_out`.  Raises ConfigError if the file
    is broken, if it has no such column, or if that holds no texts.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path} needs the package pyarrow: {INSTALL}") from None
    number = 0
    try:
        with open_regular(path) as file:
            read = _parquet if kind == "parquet" else _arrow
            for column in read(pyarrow, file, path, field):
                for value in _texts(pyarrow, column, path, field):
                    number += 1
                    origin = f"{path}:{number}"
                    size = value.as_buffer().size if value.is_valid else 0
                    if size > LONGEST_VALUE:
                        left_out.add(TOO_LONG, origin, f"{size:,} bytes", size)
                        continue
                    try:
                        yield origin, value.as_py().decode("utf-8") if value.is_valid else None
                    except UnicodeDecodeError:
                        left_out.add(NOT_UTF8, origin, num_bytes=size)
    except UnreadableError as error:
        raise refused(error) from None
    except (pyarrow.ArrowException, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path} cannot be read as {kind} after row {number} ({words}); get it again"
        ) from None


def _texts(pyarrow: Any, column: Any, path: Path, field: str) -> Iterator[Any]:
    """Yield the texts of a column as scalars of bytes.

    A dictionary is not written out: a kilobyte can name one long text a million times.
    """
    column.validate()
    kind, is_dictionary = _bytes_of(pyarrow, column, path, field), _is_dictionary(pyarrow, column)
    texts = (column.dictionary if is_dictionary else column).cast(kind)
    texts.validate(full=True)
    if not is_dictionary:
        yield from texts
        return
    for index in column.indices:
        if index.is_valid and not 0 <= index.as_py() < len(texts):
            raise pyarrow.ArrowInvalid(f"{index} is not in a dictionary of {len(texts)}")
        yield texts[index.as_py()] if index.is_valid else pyarrow.scalar(None, kind)


def _parquet(pyarrow: Any, file: Any, path: Path, field: str) -> Iterator[Any]:
    """Yield the column of a parquet file batch by batch."""
    opened = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
    _require(field, opened.schema_arrow.names, path)
    number = opened.schema_arrow.names.index(field)
    metadata = opened.metadata
    for group in range(metadata.num_row_groups):
        # Columns before it may have several leaves; then the size of the whole group counts.
        found = metadata.row_group(group)
        is_flat = found.num_columns == len(opened.schema_arrow.names)
        size = found.column(number).total_uncompressed_size if is_flat else found.total_byte_size
        rows_at_once = _BATCH * found.num_rows // max(1, size)
        for batch in opened.iter_batches(
            batch_size=min(max(1, rows_at_once), _MOST_ROWS), row_groups=[group], columns=[field]
        ):
            yield batch.column(0)


def _arrow(pyarrow: Any, file: Any, path: Path, field: str) -> Iterator[Any]:
    """Yield the column of an arrow file, record batch by record batch."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(file)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = pyarrow.ipc.open_stream(file)
        batches = iter(reader)
    _require(field, reader.schema.names, path)
    for batch in batches:
        yield batch.column(field)


def _require(field: str, names: list[str], path: Path) -> None:
    if names.count(field) != 1:
        number = "several columns" if field in names else "no column"
        raise ConfigError(
            f"{path} has {number} {field!r} (found: {', '.join(names)}); set data.jsonl_field"
        )


def _bytes_of(pyarrow: Any, column: Any, path: Path, field: str) -> Any:
    """Return the type to cast a column to, so that texts are decoded here.

    Raises ConfigError if it has no texts.
    """
    types = pyarrow.types
    kind = column.type.value_type if _is_dictionary(pyarrow, column) else column.type
    if types.is_string(kind) or types.is_null(kind) or types.is_string_view(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    raise ConfigError(
        f"{path}: column {field!r} holds {kind}, not text; set data.jsonl_field to one that does"
    )


def _is_dictionary(pyarrow: Any, column: Any) -> bool:
    return bool(pyarrow.types.is_dictionary(column.type))
