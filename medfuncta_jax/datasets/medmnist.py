"""MedMNIST v2 and MedMNIST+ (Yang et al. 2023): 2D sets at 28, 64, 128 and 224, 3D sets at 28 and 64.

The published .npz file is looked for in the data directory and else downloaded into the cache and checked. Another
file with the same layout in the data directory (`NAME.npz`, or `NAME_SIZE.npz` for a size other than 28, holding
train_images, train_labels, val_images and so on, uint8) is a dataset too, without any entry here.

Stored as published, uint8: RGB keeps its three channels, volumes are [N, D, H, W]. MedMNIST gives no voxel spacing, so
its volumes have no affine.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from medfuncta_jax.datasets.dataset import SPLITS, DataError, Example, Plan, PlannedSplit, Task, required_folder
from medfuncta_jax.datasets.npz import ArrayInFile, npz_arrays
from medfuncta_jax.datasets.prepared import file_md5
from medfuncta_jax.settings import SettingsError

_log = logging.getLogger(__name__)

_URL = "https://zenodo.org/records/10519652/files/{}?download=1"
_SIZES_2D, _SIZES_3D = (28, 64, 128, 224), (28, 64)


class _Set:
    """What is published of a set: classes separated by "; ", the MD5 of each size in rising order."""

    def __init__(self, task: Task, channels: int, classes: str, md5: str, licence: str = "CC BY 4.0"):
        self.task = task
        self.channels = channels
        self.classes = tuple(classes.split("; "))
        self.licence = licence
        sums = md5.split()
        self.dimensions = 2 if len(sums) == len(_SIZES_2D) else 3
        self.md5 = dict(zip(_SIZES_2D if self.dimensions == 2 else _SIZES_3D, sums, strict=True))


_ORGANS = (
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; lung-right; pancreas; spleen"
)

_SETS = {
    "pathmnist": _Set(
        "multi-class",
        3,
        "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; cancer-associated "
        "stroma; colorectal adenocarcinoma epithelium",
        "a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616 "
        "ac42d08fb904d92c244187169d1fd1d9 2c51a510bcdc9cf8ddb2af93af1eadec",
    ),
    "chestmnist": _Set(
        "multi-label",
        1,
        "atelectasis; cardiomegaly; effusion; infiltration; mass; nodule; pneumonia; pneumothorax; consolidation; "
        "edema; emphysema; fibrosis; pleural; hernia",
        "02c8a6516a18b556561a56cbdd36c4a8 9de6cd0b934ebb5b7426cfba5efbae16 "
        "db107e5590b27930b62dbaf558aebee3 45bd33e6f06c3e8cdb481c74a89152aa",
    ),
    "dermamnist": _Set(
        "multi-class",
        3,
        "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; benign keratosis-like lesions; "
        "dermatofibroma; melanoma; melanocytic nevi; vascular lesions",
        "0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f "
        "2defd784463fa5243564e855ed717de1 8974907d8e169bef5f5b96bc506ae45d",
        licence="CC BY-NC 4.0",
    ),
    "octmnist": _Set(
        "multi-class",
        1,
        "choroidal neovascularization; diabetic macular edema; drusen; normal",
        "c68d92d5b585d8d81f7112f81e2d0842 e229e9440236b774d9f0dfef9d07bdaf "
        "0a97e76651ace45c5d943ee3f65b63ae abc493b6d529d5de7569faaef2773ba3",
    ),
    "pneumoniamnist": _Set(
        "binary-class",
        1,
        "normal; pneumonia",
        "28209eda62fecd6e6a2d98b1501bb15f 8f4eceb4ccffa70c672198ea285246c6 "
        "05b46931834c231683c68f40c47b2971 d6a3c71de1b945ea11211b03746c1fe1",
    ),
    "retinamnist": _Set(
        "ordinal-regression",
        3,
        "0; 1; 2; 3; 4",
        "bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc "
        "e48e916a24454daf90583d4e6efb1a18 eae7e3b6f3fcbda4ae613ebdcbe35348",
    ),
    "breastmnist": _Set(
        "binary-class",
        1,
        "malignant; normal, benign",
        "750601b1f35ba3300ea97c75c52ff8f6 742edef2a1fd1524b2efff4bd7ba9364 "
        "363e4b3f8d712e9b5de15470a2aaadf1 b56378a6eefa9fed602bb16d192d4c8b",
    ),
    "bloodmnist": _Set(
        "multi-class",
        3,
        "basophil; eosinophil; erythroblast; immature granulocytes (myelocytes, metamyelocytes and "
        "promyelocytes); lymphocyte; monocyte; neutrophil; platelet",
        "7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b "
        "adace1e0ed228fccda1f39692059dd4c b718ff6835fcbdb22ba9eacccd7b2601",
    ),
    "tissuemnist": _Set(
        "multi-class",
        1,
        "Collecting Duct, Connecting Tubule; Distal Convoluted Tubule; Glomerular endothelial cells; Interstitial "
        "endothelial cells; Leukocytes; Podocytes; Proximal Tubule Segments; Thick Ascending Limb",
        "ebe78ee8b05294063de985d821c1c34b 123ece2eba09d0aa5d698fda57103344 "
        "61b955355d7425a89687b06cca3ce0c2 b077128c4a949f0a4eb01517f9037b9c",
    ),
    "organamnist": _Set(
        "multi-class",
        1,
        _ORGANS,
        "68e3f8846a6bd62f0c9bf841c0d9eacc 2dcccc29b88e6da5a01161ef20cda288 "
        "eeae80d0a227a8d099027e1b3cfd3b60 50747347e05c87dd3aaf92c49f9f3170",
    ),
    "organcmnist": _Set(
        "multi-class",
        1,
        _ORGANS,
        "b9ceb9546e10131b32923c5bbeaea2b1 3ce34a8724ea6f548e6db4744d03b6a9 "
        "773c1f009daa3fe5d9a2a201b2a7ed94 050f5e875dc056f6768abf94ec9995d1",
    ),
    "organsmnist": _Set(
        "multi-class",
        1,
        _ORGANS,
        "9ab87b696fb54e2a387ebe992d6ed5f1 53a6d115339d874c25e309a994ff46d3 "
        "ded0c5fa01a95dc4978b956f613e9b8e b354719e553fbbb2513d5533f52a4cb1",
    ),
    "organmnist3d": _Set(
        "multi-class",
        1,
        "liver; kidney-right; kidney-left; femur-right; femur-left; bladder; heart; lung-right; lung-left; "
        "spleen; pancreas",
        "a0c5a1ff56af4f155c46d46fbb45a2fe 58a2205adf14a9d0a189cb06dc78bf10",
    ),
    "nodulemnist3d": _Set(
        "binary-class",
        1,
        "benign; malignant",
        "8755a7e9e05a4d9ce80a24c3e7a256f3 c47c5b7d457bf6332200d2ea6d64ecd8",
    ),
    "adrenalmnist3d": _Set(
        "binary-class",
        1,
        "normal; hyperplasia",
        "bbd3c5a5576322bc4cdfea780653b1ce 17721accfe9fb005146a47d33bc54b2f",
    ),
    "fracturemnist3d": _Set(
        "multi-class",
        1,
        "buckle rib fracture; nondisplaced rib fracture; displaced rib fracture",
        "6aa7b0143a6b42da40027a9dda61302f f01d7e6316aedf4210da0da5b7437b42",
    ),
    "vesselmnist3d": _Set(
        "binary-class",
        1,
        "vessel; aneurysm",
        "b41fd4f7e7e2feedddb201585ecafa1b 6bb274a8846e1097066dcd64e2c4520f",
    ),
    "synapsemnist3d": _Set(
        "binary-class",
        1,
        "inhibitory synapse; excitatory synapse",
        "1235b78a3cd6280881dd7850a78eadb6 43bd14ebf3af9d3dd072446fedc14d5e",
    ),
}


@dataclass(frozen=True)
class Options:
    """Settings of the source.

    Attributes:
      flag: the set's name as in its file, "pneumoniamnist" or "organmnist3d"; or that of a file of yours.
      size: 28, 64, 128 or 224; 28 or 64 for volumes.
    """

    flag: str
    size: int = 28

    def __post_init__(self):
        known = _SETS.get(self.flag)
        if known and self.size not in known.md5:
            raise SettingsError(f"size of {self.flag} must be one of {', '.join(map(str, known.md5))}, got {self.size}")
        if not self.flag or Path(self.flag).name != self.flag:
            raise SettingsError(f"flag must be a name without folders, got {self.flag!r}")
        if self.size < 1:
            raise SettingsError(f"size must be at least 1, got {self.size}")

    @property
    def file(self) -> str:
        """The name of the set's file."""
        return f"{self.flag}.npz" if self.size == 28 else f"{self.flag}_{self.size}.npz"


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The set's images and labels.

    Raises:
      SettingsError: a flag that is neither MedMNIST's nor a file in the data directory.
      DataError: the file is absent and cannot be downloaded, is damaged, lacks an array, or holds arrays that do not
        belong together.
    """
    known = _SETS.get(options.flag)
    path, md5 = _located(options, data_dir, cache_root)
    arrays = npz_arrays(path)
    images: dict[str, ArrayInFile] = {}
    labels: dict[str, np.ndarray] = {}
    for name in SPLITS:
        for key in (f"{name}_images", f"{name}_labels"):
            if key not in arrays:
                raise DataError(f"{path}: array {key} is missing (it holds {', '.join(arrays) or 'none'})")
        images[name] = arrays[f"{name}_images"]
        labels[name] = _whole_numbers(path, arrays[f"{name}_labels"])
        if len(labels[name]) != images[name].shape[0]:
            raise DataError(
                f"{path}: {images[name].shape[0]} {name} images and {len(labels[name])} labels; copy the file anew"
            )
        if not len(labels[name]):
            raise DataError(f"{path}: the {name} split is empty; take another file")
    grid, channels = _common_shape(path, images, options)
    task, classes = _meaning(path, labels, known)

    def examples(name: str) -> Iterator[Example]:
        for i, (image, label) in enumerate(zip(images[name].items(), labels[name], strict=True)):
            yield Example(image.reshape(*grid, channels), f"{name}-{i:06d}", label)

    return Plan(
        name="medmnist",
        grid=grid,
        channels=channels,
        dtype="uint8",
        classes=classes,
        task=task,
        splits={name: PlannedSplit(len(labels[name]), functools.partial(examples, name)) for name in SPLITS},
        about={
            "source": "medmnist",
            "version": 1,
            "title": options.flag,
            "licence": known.licence if known else "not known",
            "options": asdict(options),
            "md5": {path.name: md5},
            "split_rule": "as in the file",
        },
    )


def _located(options: Options, data_dir: str | None, cache_root: Path) -> tuple[Path, str]:
    """The set's file, downloaded if need be, and its MD5."""
    known = _SETS.get(options.flag)
    path = required_folder(data_dir, options.file) / options.file if data_dir is not None else None
    if path is not None and path.is_file():
        md5 = file_md5(path)
        if known and md5 != known.md5[options.size]:
            _log.warning(
                "%s has MD5 %s, MedMNIST publishes %s; going on with this file", path, md5, known.md5[options.size]
            )
        return path, md5
    if known is None:
        close = difflib.get_close_matches(options.flag, _SETS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(_SETS)}"
        where = f"{path}: no such file" if path else f"give the folder of {options.file} with --data_dir=DIR"
        raise SettingsError(f"data.flag {options.flag!r} is no MedMNIST set ({remedy}) and {where}")
    return _downloaded(options.file, known.md5[options.size], cache_root / "downloads" / "medmnist", data_dir)


def _downloaded(name: str, md5: str, folder: Path, data_dir: str | None) -> tuple[Path, str]:
    path, url = folder / name, _URL.format(name)
    if path.is_file():
        if file_md5(path) != md5:
            raise DataError(f"{path}: its MD5 is not {md5} as published; remove the file, it is then downloaded anew")
        return path, md5
    sought = f"{name} is not in {data_dir}" if data_dir is not None else f"{name} is not there"
    remedy = "download it elsewhere and give its folder with --data_dir=DIR"
    part = folder / f"{name}.{os.getpid()}.part"
    _log.info("downloading %s to %s", url, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            digest = hashlib.md5()
            with open(part, "wb") as file, urllib.request.urlopen(url, timeout=60) as response:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
            if digest.hexdigest() != md5:
                raise DataError(
                    f"{name} from {url} has MD5 {digest.hexdigest()}, not {md5} as published, and was refused; "
                    f"try again or {remedy}"
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise DataError(f"{sought} and {url} cannot be downloaded ({error}); {remedy}") from error
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write {name} ({error.strerror or error}); free space there or name a writable directory "
            "with --config.data.cache_dir=DIR"
        ) from error
    return path, md5


def _whole_numbers(path: Path, array: ArrayInFile) -> np.ndarray:
    """Labels as int64, [N] or [N, classes]."""
    if len(array.shape) not in (1, 2) or array.dtype.kind not in "uibf":
        raise DataError(f"{path}: {array.key} is {array.dtype} {array.shape}, whole numbers [N] or [N, 1] are needed")
    values = array.read()
    if not np.all(np.isfinite(values)) or np.any(values != np.floor(values)):
        raise DataError(f"{path}: {array.key} holds labels that are no whole numbers; repair or replace the file")
    whole = values.astype(np.int64)
    return whole[:, 0] if whole.ndim == 2 and whole.shape[1] == 1 else whole


def _common_shape(path: Path, images: dict[str, ArrayInFile], options: Options) -> tuple[tuple[int, ...], int]:
    """The grid and channels that all three arrays share."""
    known = _SETS.get(options.flag)
    for array in images.values():
        if array.dtype != np.uint8:
            raise DataError(f"{path}: {array.key} is {array.dtype}, uint8 is needed; convert it to 0 .. 255")
    shapes = {array.key: array.shape[1:] for array in images.values()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise DataError(f"{path}: images of different shapes or channel counts ({listed}); all must be alike")
    shape = images["train"].shape[1:]
    if known:
        expected = (options.size,) * known.dimensions
        if shape != expected + ((known.channels,) if known.channels > 1 else ()):
            raise DataError(
                f"{path}: images are {shape}, {options.flag} at size {options.size} has {expected} and "
                f"{known.channels} channel(s); replace the file"
            )
        return expected, known.channels
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise DataError(f"{path}: images are {shape}; [H, W], [H, W, 3], [D, H, W] or [D, H, W, 3] are needed")
    coloured = len(shape) == 4 or (len(shape) == 3 and shape[-1] == 3)
    return (shape[:-1], shape[-1]) if coloured else (shape, 1)


def _meaning(path: Path, labels: dict[str, np.ndarray], known: _Set | None) -> tuple[Task, tuple[str, ...]]:
    """The task and the classes; labels outside them are an error."""
    shapes = {array.shape[1:] for array in labels.values()}
    if len(shapes) > 1:
        raise DataError(f"{path}: labels of the splits differ in width {sorted(shapes)}; replace the file")
    multiple = shapes != {()}
    largest = max(int(array.max()) for array in labels.values())
    if known:
        task, classes = known.task, known.classes
    elif multiple:
        task, classes = "multi-label", tuple(str(i) for i in range(shapes.pop()[0]))
    else:
        task, classes = "multi-class", tuple(str(i) for i in range(largest + 1))
    if not known:
        _log.info("%s is no MedMNIST set: %s, %d classes numbered from its labels", path, task, len(classes))
    width = labels["train"].shape[1] if multiple else None
    if (task == "multi-label") != multiple or (multiple and width != len(classes)):
        raise DataError(f"{path}: labels have {width or 1} columns, {task} with {len(classes)} classes is expected")
    top = 1 if multiple else len(classes) - 1
    if largest > top or min(int(array.min()) for array in labels.values()) < 0:
        raise DataError(f"{path}: a label lies outside 0 to {top}; repair or replace the file")
    return task, classes
