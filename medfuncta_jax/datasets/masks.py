"""Segmentation masks that a pattern matches beside their images: recognised, and refused with the pattern to use."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from medfuncta_jax.datasets.dataset import DataError

# Maximum number of different values in a mask; images have more.
_MOST_LABELS = 64

# Maximum number of pairs that are read.
_READ = 3

# Words between separators that mark the name of a mask.
_MASK_WORDS = frozenset(("seg", "mask", "masks", "label", "labels", "segmentation", "annotation", "roi", "gt"))

_SUFFIXES = re.compile(r"(\.[A-Za-z]{2,4})?(\.gz)?$")


def refuse_masks(folder: Path, files: Mapping[str, Path], read: Callable[[Path], np.ndarray]) -> None:
    """Refuse files if some are masks of others.

    A mask is a file of whole numbers with few different values. It has the name of an image in another folder
    (`imagesTr` and `labelsTr` in the Medical Segmentation Decathlon), or that name with a word such as "seg" or "mask".
    Pairs by name are found first, and some of them are read; a folder without such pairs costs nothing.

    Args:
      folder: the data directory.
      files: the matching files, by their names relative to `folder`, "/" between folders.
      read: gives the stored values of a file, or raises DataError.
    Raises:
      DataError: names a mask, its image and a pattern that leaves the masks out.
    """
    pairs = list(_pairs(files))
    for one, other in pairs[:: max(1, len(pairs) // _READ)][:_READ]:
        try:
            first, second = (_few_whole_numbers(read(files[name])) for name in (one, other))
        except DataError:  # it will be skipped
            continue
        if first != second:
            mask, image = (one, other) if first else (other, one)
            pattern = _pattern(files, mask, image)
            advice = f"give data.pattern='{pattern}'" if pattern else "leave out masks by data.pattern"
            raise DataError(f"{folder}: {mask} is a mask of {image} (few whole numbers), and both match; {advice}")


def _pairs(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Names of two files that may be an image and its mask."""
    plain: dict[tuple[str, ...], list[str]] = {}
    marked: dict[tuple[str, ...], list[str]] = {}
    for name in files:
        words = tuple(_words(name))
        (marked if _marked(name) else plain).setdefault(words, []).append(name)
        if not _marked(name):  # as "case-t1n" beside "case-seg"
            plain.setdefault(words[:-1], []).append(name)
    for words, masks in marked.items():
        if images := plain.get(words):
            yield masks[0], images[0]
    for names in plain.values():
        places = {PurePosixPath(name).parent: name for name in names}
        same = [name for name in places.values() if _words(name) == _words(names[0])]
        yield from itertools.islice(itertools.combinations(same, 2), 3)


def _all_words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", _SUFFIXES.sub("", PurePosixPath(name).name.lower())) if word]


def _words(name: str) -> list[str]:
    return [word for word in _all_words(name) if word not in _MASK_WORDS]


def _marked(name: str) -> bool:
    return bool(_MASK_WORDS & set(_all_words(name)))


def _few_whole_numbers(values: np.ndarray) -> bool:
    """Whether an array holds whole numbers of few different values, and more than one."""
    values = np.asarray(values, np.float32)
    if not np.array_equal(values, np.rint(values)):
        return False
    return 2 <= len(np.unique(values)) <= _MOST_LABELS


def _pattern(files: Mapping[str, Path], mask: str, image: str) -> str:
    """A glob that matches the image and similar files, and no mask; "" if none of the usual globs does."""
    place, ending = PurePosixPath(image), _SUFFIXES.search(image)[0]  # type: ignore[index]
    parts = re.split(r"([_.-])", PurePosixPath(image.removesuffix(ending)).name)
    last = f"*{parts[-2]}{parts[-1]}" if len(parts) > 1 else "*"
    tries = []
    if place.parent != PurePosixPath(mask).parent:
        top = place.parts[0]
        if top != PurePosixPath(mask).parts[0] and len(place.parts) > 1:
            tries.append(f"{top}/*{ending}" if len(place.parts) == 2 else f"{top}/**/*{ending}")
        tries.append(f"**/{place.parent.name}/*{ending}" if place.parent.name else f"*{ending}")
    tries.append(f"**/{last}{ending}")
    for pattern in tries:
        matched = [name for name in files if _matches(name, pattern)]
        if image in matched and mask not in matched and not any(map(_marked, matched)):
            return pattern
    return ""


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches a glob, in which "**/" is any folders or none, and "*" stays within one folder."""
    regex = "".join(
        "(?:.*/)?" if part == "**/" else "[^/]*" if part == "*" else re.escape(part)
        for part in re.split(r"(\*\*/|\*)", pattern)
    )
    return re.fullmatch(regex, name) is not None
