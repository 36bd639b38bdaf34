"""From what people have in memory to rows: texts, or token ids without their padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from panguq.data.calibration_files import CHAT_FIELDS, TEXT_FIELDS, is_file_name
from panguq.data.calibration_masks import without_padding
from panguq.data.calibration_tokens import conversation_text, is_message
from panguq.errors import InputError, PanguqError

FORMS = (
    "give a path (text, .jsonl, .json, .parquet); with a tokenizer texts, conversations, or rows "
    "with text or messages; token ids [sequences, seq], lists of ids, or rows with input_ids and "
    "perhaps attention_mask"
)
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Text:
    """One text, and where it stood. A conversation's has the special tokens in it."""

    where: str
    text: str
    is_chat: bool = False


@dataclass(frozen=True)
class Ids:
    """Token ids, int64 `[batch, seq]` without padding, and where they stood.

    `types` of the same shape are their `token_type_ids`, if they were given.
    """

    where: str
    ids: Tensor
    types: Tensor | None = None


@dataclass(frozen=True)
class Empty:
    """A row that holds nothing."""

    where: str


Row = Text | Ids | Empty


def items_of(data: Any) -> Iterable[tuple[str, Any]]:
    """The items of calibration data, with a name for each that says where it stands.

    A tensor's rows are items of their own. A mapping, a flat list of ids and a conversation are
    one item. Raises InputError for what holds no items, and for what fails while it is read.
    """
    data = _plain(data)
    _refuse_ids_with_mask(data)
    if isinstance(data, Tensor):
        data = list(data.split(1)) if data.dim() >= 2 else [data]
    elif isinstance(data, Mapping) or _is_one_row(data):
        data = [data]
    elif not isinstance(data, Iterable) and hasattr(data, "__getitem__"):
        data = _indexed(data)
    if not isinstance(data, Iterable) or isinstance(data, bytes | bytearray | set | frozenset):
        raise InputError(f"calibration data is a {type(data).__name__}", FORMS)
    return _named(data)


def _refuse_ids_with_mask(data: Any) -> None:
    """Two tensors of one shape, the second of zeros and ones: it is no second batch of ids."""
    if not isinstance(data, list | tuple) or len(data) != 2:
        return
    if not all(isinstance(item, Tensor) and item.dim() == 2 for item in data):
        return
    ids, mask = data
    if ids.shape == mask.shape and bool((mask <= 1).all()) and bool((ids > 1).any()):
        raise InputError(
            "calibration item 1 is a tensor of zeros and ones, the mask of item 0 it seems",
            'give {"input_ids": ids, "attention_mask": mask}',
        )


def _plain(data: Any) -> Any:
    """Arrays as tensors or lists, tables of pandas, polars and pyarrow as mappings of columns."""
    if isinstance(data, Tensor):
        return list(data.unbind()) if data.is_nested else data
    if hasattr(data, "to_pydict"):
        return data.to_pydict()
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):
        return {str(name): data[name].to_list() for name in data.columns}
    if hasattr(data, "__array__") and hasattr(data, "dtype"):
        return _array(data)
    return data


def _array(data: Any) -> Any:
    """An array of numbers as a tensor, any other as a list."""
    import numpy

    array = numpy.asarray(data)
    if array.dtype.kind in "iu":
        return torch.from_numpy(numpy.atleast_1d(array).astype("int64"))
    return torch.as_tensor(array) if array.dtype.kind in "fb" else array.tolist()


def _is_one_row(data: Any) -> bool:
    if not isinstance(data, list | tuple) or not data:
        return False
    return _are_ids(data) or is_message(data[0])


def _are_ids(data: Sequence[Any]) -> bool:
    return all(isinstance(item, Integral) and not isinstance(item, bool) for item in data)


def _indexed(data: Any) -> Iterator[Any]:
    """The items of a map-style dataset."""
    return (data[index] for index in range(len(data)))


def _named(data: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    loader = isinstance(data, torch.utils.data.DataLoader)
    index = 0
    try:
        for index, item in enumerate(data):
            where = f"calibration item {index}"
            if loader and isinstance(item, Mapping):
                _check_collated(item, where)
            yield where, item
            index += 1
    except PanguqError:
        raise
    except Exception as error:  # whatever somebody's data set or collate function raises
        raise InputError(
            f"calibration item {index} cannot be read: {type(error).__name__}: {error}",
            "rows of several lengths need batch_size=1 or a collate_fn that pads them",
        ) from error


def _check_collated(item: Mapping[str, Any], where: str) -> None:
    """Lists of numbers leave a DataLoader as one tensor for each position: transposed."""
    ids = item.get("input_ids")
    if isinstance(ids, list) and ids and isinstance(ids[0], Tensor):
        raise InputError(
            f"{where}: the DataLoader made {len(ids)} tensors of shape {list(ids[0].shape)} out of "
            "the lists in input_ids, one for each position",
            'give the data set itself, or call its set_format("torch") first',
        )


def rows_of(item: Any, where: str, tokenizer: Any) -> Iterator[Row]:
    """The rows of one item. Raises InputError, naming the item, for what is no calibration data."""
    item = _plain(item)
    if _is_nothing(item):
        yield Empty(where)
    elif isinstance(item, str):
        yield _text(item, where)
    elif isinstance(item, Mapping):
        yield from _mapping_rows(item, where, tokenizer)
    elif isinstance(item, Tensor):
        yield from _id_rows(item, None, None, where)
    elif isinstance(item, list | tuple):
        yield from _list_rows(item, where, tokenizer)
    else:
        raise _refused(item, where)


def _is_nothing(item: Any) -> bool:
    """What tables have where there is nothing: None, or NaN."""
    return item is None or (isinstance(item, float) and item != item)


def _refused(item: Any, where: str) -> InputError:
    return InputError(f"{where} is a {type(item).__name__}, not text or token ids", FORMS)


def _text(item: str, where: str) -> Row:
    if is_file_name(item):
        raise InputError(
            f"{where} is {item!r}, a file's name and no text",
            "give the path itself as calibration data, or the texts of the files",
        )
    return Text(where, item) if item.strip() else Empty(where)


def _list_rows(item: Sequence[Any], where: str, tokenizer: Any) -> Iterator[Row]:
    if not item:
        yield Empty(where)
    elif _are_ids(item):
        yield from _id_rows(item, None, None, where)
    elif is_message(item[0]):
        yield Text(where, conversation_text(tokenizer, item, where), is_chat=True)
    elif isinstance(item[0], Tensor) and len(item) > 1:
        raise InputError(
            f"{where} is a {type(item).__name__} of {len(item)} tensors of shapes "
            f"{', '.join(str(list(t.shape)) for t in item[:3] if isinstance(t, Tensor))}",
            "which of them are token ids is not clear: give the ids alone, or mappings with "
            "input_ids and attention_mask",
        )
    elif isinstance(item[0], str | Sequence | Mapping | Tensor) or item[0] is None:
        for index, row in enumerate(item):
            yield from rows_of(row, f"{where}, row {index}" if len(item) > 1 else where, tokenizer)
    elif all(isinstance(value, Integral | float) for value in item):
        raise InputError(f"{where} is a {type(item).__name__} of numbers that are no ids", FORMS)
    else:
        raise _refused(item, where)


def _mapping_rows(item: Mapping[str, Any], where: str, tokenizer: Any) -> Iterator[Row]:
    if "input_ids" in item:
        mask, types = item.get("attention_mask"), item.get("token_type_ids")
        yield from _id_rows(item["input_ids"], mask, types, where)
        return
    chat = next((name for name in CHAT_FIELDS if name in item), None)
    text = next((name for name in TEXT_FIELDS if name in item), None)
    if text is not None and not is_message(item):
        yield from _text_rows(item[text], text, where)
    elif chat is not None:
        yield from _chat_rows(item[chat], chat, where, tokenizer)
    else:
        names = [str(name) for name in item]
        split = [name for name in _SPLITS if name in names]
        message = f"{where} has no input_ids, text or messages, but {', '.join(names) or 'nothing'}"
        raise InputError(message, f"give one split, such as {split[0]!r}" if split else FORMS)


def _text_rows(value: Any, name: str, where: str) -> Iterator[Row]:
    """The rows of a field that holds one text or a column of them."""
    value = _plain(value)
    is_column = isinstance(value, list | tuple)
    for index, text in enumerate(value if is_column else [value]):
        place = f"{where}, row {index}" if is_column else where
        if _is_nothing(text) or (isinstance(text, str) and not text.strip()):
            yield Empty(place)
        elif isinstance(text, str):
            yield Text(place, text)
        else:
            raise InputError(f"{place}: {name} is a {type(text).__name__}, not a text", FORMS)


def _chat_rows(value: Any, name: str, where: str, tokenizer: Any) -> Iterator[Row]:
    """The rows of a field that holds one conversation or a column of them."""
    value = _as_messages(value)
    if not isinstance(value, list | tuple | None):
        said = f"{where}: {name} is a {type(value).__name__}, not a list of messages"
        raise InputError(said, FORMS)
    for row in rows_of(value, where, tokenizer):
        if isinstance(row, Ids) or (isinstance(row, Text) and not row.is_chat):
            raise InputError(f"{row.where}: {name} holds no messages", FORMS)
        yield row


def _as_messages(value: Any) -> Any:
    """A conversation that a data set keeps as columns, role by role and content by content."""
    value = _plain(value)
    if not isinstance(value, Mapping):
        return value
    names, columns = list(value), [list(_plain(column)) for column in value.values()]
    return [dict(zip(names, turn, strict=False)) for turn in zip(*columns, strict=False)]


def _id_rows(ids: Any, mask: Any, types: Any, where: str) -> Iterator[Row]:
    """Rows of token ids: `[batch, seq]` with one length, or lists of several lengths."""
    ids, mask, types = _plain(ids), _plain(mask), _plain(types)
    if ids is None:
        yield Empty(where)
    elif isinstance(ids, Tensor):
        yield from _tensor_rows(ids, mask, types, where)
    elif not isinstance(ids, list | tuple):
        raise InputError(f"{where}: input_ids are a {type(ids).__name__}", FORMS)
    elif _are_ids(ids):
        if any(abs(int(value)) >> 63 for value in ids):
            raise InputError(f"{where} holds numbers that are too large for token ids", FORMS)
        yield from _tensor_rows(torch.tensor(ids, dtype=torch.int64), mask, types, where)
    else:
        yield from _ragged_rows(ids, mask, types, where)


def _rows_beside(ids: Sequence[Any], given: Any, name: str, where: str) -> Sequence[Any]:
    """What is given beside each row of ids, None where nothing is."""
    rows = isinstance(given, list | tuple) or (isinstance(given, Tensor) and given.dim() > 0)
    beside: Sequence[Any] = given if rows else [None] * len(ids)
    if (given is not None and not rows) or len(beside) != len(ids):
        raise InputError(
            f"{where}: {name} has not the {len(ids)} rows of input_ids",
            "give one row of it for each row of ids",
        )
    return beside


def _ragged_rows(ids: Sequence[Any], mask: Any, types: Any, where: str) -> Iterator[Row]:
    masks = _rows_beside(ids, mask, "attention_mask", where)
    typed = _rows_beside(ids, types, "token_type_ids", where)
    lengths = {len(row) for row in ids if isinstance(row, Tensor) and row.dim() == 1}
    if len(ids) > 1 and len(lengths) == 1 and all(isinstance(row, Tensor) for row in ids):
        raise InputError(
            f"{where}: input_ids are {len(ids)} tensors of shape {[*lengths]}",
            "rows or positions? give one tensor [batch, seq]",
        )
    for index, (row, keep, kinds) in enumerate(zip(ids, masks, typed, strict=True)):
        place = f"{where}, row {index}"
        if isinstance(_plain(row), list | tuple) and not _are_ids(row):
            raise InputError(f"{place} is a {type(row).__name__} of something else than ids", FORMS)
        yield from _id_rows(row, keep, kinds, place)


def _tensor_rows(ids: Tensor, mask: Any, types: Any, where: str) -> Iterator[Row]:
    if ids.dim() not in (1, 2):
        raise InputError(f"{where}: token ids have shape {list(ids.shape)}", "give [batch, seq]")
    if ids.numel() == 0:
        for _ in range(len(ids) if ids.dim() == 2 else 1):
            yield Empty(where)
        return
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{where}: token ids are {ids.dtype}", "give integers")
    kept = without_padding(ids.long(), mask, where)
    if types is None:
        yield from (Ids(where, row) for row in kept)
        return
    kinds = without_padding(_token_types(types, ids, where), mask, where)
    yield from (Ids(where, row, kind) for row, kind in zip(kept, kinds, strict=True))


def _token_types(types: Any, ids: Tensor, where: str) -> Tensor:
    """`token_type_ids` as integers of the ids' shape."""
    form = "give [batch, seq] as input_ids: the segment that each token belongs to"
    try:
        found = torch.as_tensor(types)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: token_type_ids are ragged or no numbers", form) from error
    if found.shape != ids.shape or found.is_floating_point() or found.is_complex():
        raise InputError(
            f"{where}: token_type_ids are {found.dtype} of shape {list(found.shape)}, input_ids "
            f"have {list(ids.shape)}",
            form,
        )
    return found.long()
