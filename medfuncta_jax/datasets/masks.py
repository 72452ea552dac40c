"""Segmentation masks beside images: their files, their labels, and masks that are taken for images, refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from medfuncta_jax.datasets.dataset import DataError, required_folder
from medfuncta_jax.datasets.folder_files import files_below, name_below

# Maximum number of different values in a mask; images have more.
_MOST_LABELS = 64

# Maximum number of pairs that are read.
_READ = 3

# Files beside the masks, such as a list of them, are none.
_MASK_FILE = re.compile(r"\.(nii|nii\.gz|img|mgh|mgz|png|jpe?g|tiff?)$", re.IGNORECASE)

# Words in a name that say mask, between separators.
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


def require_labels(path: Path, values: np.ndarray) -> None:
    """Refuse values of a mask file that are no labels.

    Raises:
      DataError: names the file.
    """
    # Most of a mask is one value, and whole numbers of few bits are quickly counted.
    found = np.unique(values)
    if found.dtype.kind == "f" and not np.array_equal(found, np.rint(found)):
        odd = found[found != np.rint(found)][0]
        raise DataError(f"{path}: a mask with the value {odd:g}, which is no whole number; give the file of its labels")
    if found[0] < 0 or len(found) > _MOST_LABELS:
        raise DataError(
            f"{path}: {len(found)} values from {found[0]:g} to {found[-1]:g}, a mask has at most {_MOST_LABELS}, from "
            "0 on; give the files of the masks"
        )


def matched_masks(
    where: str, ids: Collection[str], *, data_dir: str | None, unused: Collection[str] = ()
) -> dict[str, Path]:
    """The mask file of each signal: of the same name in another folder, but for its suffix and words such as "mask".

    Where several folders hold files of one name, the one whose path differs in fewest folders is taken.

    Args:
      where: a folder, or a glob, relative to the data directory; a folder may be elsewhere.
      ids: of the signals, their files' names relative to the data directory.
      data_dir: the data directory.
      unused: ids of files that are no signals, such as damaged ones, whose masks are not asked for.
    Raises:
      DataError: no masks, masks without a signal, signals without a mask, or two masks of one signal.
    """
    folder = required_folder(data_dir, "the signals and their masks")
    place = folder / Path(where).expanduser()
    if place.is_dir():
        files = {path.relative_to(place).as_posix(): path for path in files_below(place)}
    elif Path(where).is_absolute() or ".." in Path(where).parts:
        raise DataError(f"{place}: no such folder of masks; name a folder, or a glob inside the data directory")
    else:
        paths = [path for path in sorted(folder.glob(where)) if path.is_file() and not path.name.startswith(".")]
        files = {name_below(folder, path): path for path in paths}
    files = {name: path for name, path in files.items() if _MASK_FILE.search(name)}
    signals = {folder / name for name in ids}
    by_words: dict[tuple[str, ...], list[str]] = {}
    for name, path in files.items():
        if path not in signals:
            by_words.setdefault(tuple(_words(name)), []).append(name)
    if not by_words:
        raise DataError(f"{folder}: no file beside the signals matches {where!r}; name the folder of the masks")
    found: dict[str, str] = {}
    for name in ids:
        best = _nearest_names(name, by_words.get(tuple(_words(name)), []))
        if len(best) > 1:
            raise DataError(f"{folder}: {best[0]} and {best[1]} may both be the mask of {name}; name one folder")
        if best:
            found[name] = best[0]
    absent = [name for name in ids if name not in found]
    if absent:
        raise DataError(f"{place}: {_three(absent)} without a mask of the same name; add them or name another folder")
    spare = set(files) - set(found.values())
    for name in unused:
        spare -= set(_nearest_names(name, by_words.get(tuple(_words(name)), [])))
    surplus = [name for names in by_words.values() for name in names if name in spare]
    if surplus:
        raise DataError(f"{place}: {_three(surplus, 'mask')} without a signal of the same name; move them elsewhere")
    if len(set(found.values())) < len(found):
        twice = [name for name in ids if list(found.values()).count(found[name]) > 1]
        raise DataError(f"{place}: {twice[0]} and {twice[1]} have one mask, {found[twice[0]]}; give each its own")
    return {name: files[found[name]] for name in ids}


def _nearest_names(name: str, candidates: list[str]) -> list[str]:
    """Those of the candidates whose folders are most like those of a name."""
    own = set(PurePosixPath(name).parts[:-1])
    shared = {one: len(own & set(PurePosixPath(one).parts[:-1])) for one in candidates}
    return [one for one in candidates if shared[one] == max(shared.values())]


def _three(names: list[str], kind: str = "signal") -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"


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
