"""Text as streams of characters: the shipped plays of Shakespeare, or files of one's own."""

import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrnn.training.data import shipped
from fastrnn.training.data.module import SequenceData
from fastrnn.training.errors import InputError, check_held_out, check_once, check_whole
from fastrnn.training.tbptt import StreamChunks


class Vocabulary:
    """Characters and their numbers, in the order of ``characters``."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.number = {c: i for i, c in enumerate(characters)}

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def start(self) -> str:
        """What a text begins with when nobody says: a line break, or the first character if there is none."""
        return "\n" if "\n" in self.number else self.characters[0]

    def encode(self, text: str) -> Tensor:
        """int64 [N].

        Raises:
            InputError: no text, or a character is not in the vocabulary; the message shows which and where.
        """
        if not isinstance(text, str):
            raise InputError(f"a text must be characters, got {type(text).__name__}")
        unknown = sorted(set(text) - self.number.keys())
        if unknown:
            first = min(text.index(c) for c in unknown)
            shown = ", ".join(map(repr, unknown[:10]))
            raise InputError(
                f"the text holds {len(unknown)} characters that the model does not know: {shown}; "
                f"the first is at position {first}"
            )
        return torch.tensor([self.number[c] for c in text], dtype=torch.int64)

    def decode(self, numbers: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in numbers)


class TextData(SequenceData):
    """Documents in parallel streams, cut at the end for validation and test.

    Args:
        paths: text files, each one document, or the path of one; the shipped plays when left out.
        rows: parallel streams B, over all processes.
        k1: steps between updates.
        k2: steps that a gradient goes back; k1 when left out.
        held_out: shares of the characters, from the end, for validation and for test.
        limit: characters that are used, from the start; all when left out.
        prompts: texts that ``predict`` continues, or one; ``Vocabulary.start`` when left out.
        encoding: of the files' characters.

    Raises:
        InputError: a size below 1, k2 below k1, shares of 1 or more together, a file named twice; and,
            once the files are read, whatever in them does not fit.
    """

    def __init__(
        self,
        paths: list[str] | str | None = None,
        rows: int = 64,
        k1: int = 128,
        k2: int | None = None,
        held_out: tuple[float, float] = (0.05, 0.05),
        limit: int | None = None,
        prompts: tuple[str, ...] | str | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__()
        check_whole("rows", rows)
        check_whole("k1", k1)
        if k2 is not None:
            check_whole("k2", k2, k1)
        if limit is not None:
            check_whole("limit", limit)
        check_held_out(held_out)
        paths, prompts = several(paths), several(prompts)
        check_once("paths", map(os.path.realpath, paths or ()))
        if paths is not None and not paths:
            raise InputError("paths must name a file, or be left out for the shipped plays")
        self.paths, self.rows, self.k1, self.k2 = paths, rows, k1, k2
        self.held_out, self.limit, self.prompts, self.encoding = held_out, limit, prompts, encoding

    @cached_property
    def documents(self) -> list[str]:
        if self.paths is None:
            texts = list(json.loads(shipped.read("shakespeare.json")).values())
        else:
            texts = [read_text(path, self.encoding) for path in self.paths]
        return cut(texts, [self.limit or sum(map(len, texts))])[0]

    @cached_property
    def spec(self) -> dict[str, Any]:
        return {"vocabulary": "".join(sorted(set().union(*self.documents)))}

    @cached_property
    def parts(self) -> dict[str, list[Tensor]]:
        """Documents of train, val and test, encoded."""
        vocabulary = Vocabulary(self.spec["vocabulary"])
        total = sum(map(len, self.documents))
        val, test = (int(share * total) for share in self.held_out)
        pieces = cut(self.documents, [total - val - test, val, test])
        return {
            part: [vocabulary.encode(text) for text in texts]
            for part, texts in zip(("train", "val", "test"), pieces, strict=True)
        }

    def batches(self, part: str, rank: int, world: int) -> StreamChunks:
        for name in (part, "test") if part == "train" else (part,):  # a test comes after training: too late
            size = sum(map(len, self.parts[name]))
            if size < 2 * self.rows:
                raise InputError(
                    f"{name} has {size} characters: too short for {self.rows} parallel rows; "
                    "set data.rows smaller"
                )
        k2 = self.k2 if part == "train" else None
        return StreamChunks(self.parts[part], self.rows, self.k1, k2, rank, world)

    def predict_dataloader(self) -> list[str]:
        return list(self.prompts or [Vocabulary(self.spec["vocabulary"]).start])


def several(given: Any) -> Any:
    """What was given as one text or path, as a list of it: a text is no list of its characters."""
    return [given] if isinstance(given, (str, os.PathLike)) else given


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """A text file's content, without a byte order mark.

    Raises:
        InputError: no such file, another encoding, or empty.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding=encoding).removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding.upper()} text: byte {error.start} cannot be read; set encoding"
        ) from None
    except (LookupError, TypeError, ValueError) as error:  # no such encoding; a NUL in the path
        raise InputError(f"cannot read {path}: {error}") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def cut(texts: list[str], lengths: list[int]) -> list[list[str]]:
    """Split a series of texts into consecutive parts of the given numbers of characters."""
    parts, rest = [], list(texts)
    for length in lengths:
        part: list[str] = []
        while rest and length > 0:
            part.append(rest[0][:length])
            rest[0] = rest[0][length:]
            length -= len(part[-1])
            if not rest[0]:
                rest.pop(0)
        parts.append(part)
    return parts
