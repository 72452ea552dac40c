"""The stage: what it writes, what it refuses, and the labels that it must cope with."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import experiments.stages
import medfuncta_jax as mf
from experiments.runtime.interruption import Interrupted, StopRequest
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.settings import RunSettings
from experiments.stages import classify as stage
from experiments.stages import features
from experiments.stages.classify import ClassifySettings
from medfuncta_jax.checkpoint import FIELD_FILE
from medfuncta_jax.datasets import Dataset, Split
from medfuncta_jax.settings import DataSettings, ModelSettings, SettingsError
from tests.experiments.conftest import run as launch

FAST = ClassifySettings(hidden=(8,), epochs=8, batch_size=16, learning_rate=1e-2, seeds=2)
COUNTS = {"train": 40, "val": 20, "test": 30}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the stage reads of a split of the store."""

    latents: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    about: dict


class Case:
    """Made-up signals of 8 samples whose class is where they are high; latents of 4 numbers tell it too."""

    def __init__(self, monkeypatch, folder, *, task="multi-class", classes=3, grid=(8,), labels=None, options=FAST):
        generator = np.random.default_rng(0)
        self.latents, splits = {}, {}
        about = {"source": "made up", "shape": grid}  # a tuple, which JSON gives back as a list
        for name, count in COUNTS.items():
            own = np.arange(count) % classes
            if task == "multi-label":
                own = generator.integers(0, 2, (count, classes))
            own = own if labels is None else labels(name, own)
            shown = np.where(own < 0, 0, own)
            targets = shown if task == "multi-label" else np.eye(classes)[shown]
            signals = generator.uniform(0, 0.2, (count, *grid, 1)).astype(np.float32)
            signals.reshape(count, -1)[:, :classes] += 0.7 * targets
            ids = tuple(f"{name}-{i}" for i in range(count))
            records = [{"signal": s, "label": y, "id": i} for s, y, i in zip(signals, own, ids, strict=True)]
            splits[name] = Split(records, (*grid, 1), "float32")
            latents = np.concatenate([targets, np.zeros((count, 4))], 1)[:, :4] + generator.normal(size=(count, 4)) / 9
            known = {"data": json.loads(json.dumps(about)), "field_sha256": "of the field"}
            self.latents[name] = Stored((1e-3 * latents).astype(np.float32), own, ids, known)
        names = tuple(f"class {c}" for c in range(classes))
        self.dataset = Dataset("made up", grid, 1, names, splits, task, about)
        self.settings = RunSettings(DataSettings("any"), model=ModelSettings(latent_dim=4), classify=options)
        self.run = RunDirectory(folder, self.settings)
        field = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=4), len(grid), channels=1)
        mf.save_field(self.run.path / FIELD_FILE, field, field.init(jax.random.key(0)), {})
        monkeypatch.setattr(features, "load_latents", lambda path, **asked: self.latents)

    def classify(self, stop=None):
        return stage.classify(Run(self.run, StopRequest() if stop is None else stop, self.dataset))

    def change(self, name, **fields):
        self.latents[name] = dataclasses.replace(self.latents[name], **fields)


@pytest.fixture
def case(monkeypatch, tmp_path):
    return lambda **options: Case(monkeypatch, tmp_path / "run", **options)


def test_every_row_is_written_and_the_same_run_gives_the_same_scores(case, tmp_path):
    made = case()
    result = made.classify()
    assert json.loads((made.run.path / "classification.json").read_text()) == json.loads(json.dumps(result))
    names = [(row["classifier"], row["features"], row["seeds"]) for row in result["rows"]]
    assert names == [
        (name, features, 2 if name == "MLP" else 1)
        for features in ("latents", "latents, signal metric", "PCA", "values")
        for name in ("k-NN, k = 1", "k-NN, k = 3", "MLP")
    ]
    for row in result["rows"]:
        assert row["accuracy"]["mean"] > 0.8
        assert np.sum(row["confusion"]) == 30 * row["seeds"]
        assert np.trace(row["confusion"]) / np.sum(row["confusion"]) == pytest.approx(row["accuracy"]["mean"])
        assert (row["accuracy"]["spread"] is None) == (row["seeds"] == 1)
        assert (
            row["parameters"]
            == {"k": 0, "M": (8 if row["features"] == "values" else 4) * 8 + 8 + 8 * 3 + 3}[row["classifier"][0]]
        )
    (made.run.path / "classification.rows.json").unlink()
    again = made.classify()
    without_time = [[{**row, "seconds": 0} for row in each["rows"]] for each in (result, again)]
    assert without_time[0] == without_time[1]
    table = (made.run.path / "classification.md").read_text()
    assert table.count("\n| ") == 1 + 12
    assert "undefined" not in table
    assert (made.run.path / "figures" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_of_several_normalisations_the_best_by_validation_is_kept(case):
    options = dataclasses.replace(FAST, classifiers=("mlp",), features=("latents",), normalise=("none", "scale"))
    (row,) = case(options=options).classify()["rows"]
    assert row["normalise"] == "scale"  # latents of size 1e-3 are hardly learned as they are
    assert row["tried"]["scale"] == row["val_accuracy"]["mean"] > row["tried"]["none"]


def test_several_labels(case):
    result = case(task="multi-label").classify()
    for row in result["rows"]:
        assert row["confusion"] is None
        assert len(row["accuracy_of_class"]) == len(row["auroc_of_class"]) == 3
        assert row["auroc"]["mean"] > 0.8


def test_ordered_classes_add_columns(case):
    made = case(task="ordinal-regression")
    assert all(row["quadratic_kappa"]["mean"] > 0.7 for row in made.classify()["rows"])
    assert "| mean absolute error | quadratic kappa |" in (made.run.path / "classification.md").read_text()


def test_unlabelled_signals_are_left_out_and_said(case):
    def hide(name, labels):
        return np.where(np.arange(len(labels)) < 5, -1, labels)

    result = case(labels=hide).classify()
    assert result["signals"] == {"train": 35, "val": 15, "test": 25}
    assert "5 of 40 train signals have no label and are left out." in result["notes"]


def test_rare_and_absent_classes_are_said_and_leave_finite_scores(case):
    def rare(name, labels):
        labels = np.where(labels == 2, 0, labels)
        labels[0] = 2 if name != "test" else labels[0]
        return labels

    made = case(labels=rare)
    result = made.classify()
    assert "Class class 2: one member in train." in result["notes"]
    assert "Class class 2: absent from test." in result["notes"]
    for row in result["rows"]:
        assert row["auroc_of_class"][2] is None
        assert np.isfinite(row["auroc"]["mean"])
    assert "NaN" not in (made.run.path / "classification.json").read_text()


def test_a_test_split_of_one_class_has_no_auroc(case):
    made = case(classes=2, labels=lambda name, labels: labels * (name != "test"))
    assert all(row["auroc"] is None for row in made.classify()["rows"])
    assert "undefined" not in (made.run.path / "classification.md").read_text().partition("| k-NN")[0]


def test_pca_of_few_signals_has_as_many_components_as_there_are():
    notes = []
    generator = np.random.default_rng(0)
    signals = {name: generator.normal(size=(count, 50)) for name, count in (("train", 6), ("test", 3))}
    scores = features.principal_components(signals, 20, notes)
    assert scores["test"].shape == (3, 5)
    assert notes == ["PCA has 5 components, the most that 6 training signals give, not 20."]
    centred = signals["train"] - signals["train"].mean(0)
    np.testing.assert_allclose(scores["train"] @ scores["train"].T, centred @ centred.T, atol=1e-8)  # all variance


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda c: c.change("val", ids=("x",) * 20), "latents of other data"),
        (lambda c: c.change("val", about={"data": {"source": "b"}, "field_sha256": "of the field"}), "of other data"),
        (lambda c: c.change("val", about={"data": {}, "field_sha256": "of the field"}), "latents of other data"),
        (lambda c: c.change("val", latents=np.full((20, 4), np.nan, np.float32)), "are not finite"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(case, break_it, message):
    made = case()
    break_it(made)
    with pytest.raises(RunError, match=message) as refused:
        made.classify()
    assert "\n" not in str(refused.value)
    assert not (made.run.path / "classification.json").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda name, labels: np.full_like(labels, -1) if name == "val" else labels, "no signal of the val split"),
        (lambda name, labels: np.zeros_like(labels), "of one class; there is nothing to tell apart"),
    ],
)
def test_labels_that_tell_nothing_are_refused(case, labels, message):
    with pytest.raises(RunError, match=message):
        case(labels=labels).classify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifiers": ("mlp", "resnet50")}, "resnet50 sees images, made up has 1D signals"),
        ({"neighbours": (1, 41)}, "41 neighbours of 40 labelled signals"),
    ],
)
def test_settings_that_do_not_fit_the_data(case, changes, message):
    with pytest.raises(SettingsError, match=message):
        case(options=dataclasses.replace(FAST, **changes)).classify()


def test_without_scikit_learn_the_extra_is_named(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for name in ("classifiers", "classification_scores"):
        monkeypatch.delitem(sys.modules, f"experiments.stages.{name}", raising=False)
        monkeypatch.delattr(experiments.stages, name, raising=False)
    with pytest.raises(RunError, match=r"pip install 'medfuncta_jax\[classify\]'"):
        case().classify()


def test_without_keras_the_extra_is_named_before_anything_is_trained(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    options = dataclasses.replace(FAST, classifiers=("knn", "efficientnet_b0"))
    with pytest.raises(RunError, match=r"pip install 'medfuncta_jax\[classify-images\]'"):
        case(grid=(8, 8), options=options).classify()


def test_a_stop_keeps_finished_rows_and_goes_on_there(case, monkeypatch):
    made, stop, trained = case(), StopRequest(), []
    fit = experiments.stages.classifiers.mlp

    def counted(*args, **options):
        trained.append(options["seed"])
        if len(trained) == 5 and not stop:  # the first of the second MLP
            stop._note(15, None)
        return fit(*args, **options)

    monkeypatch.setattr(experiments.stages.classifiers, "mlp", counted)
    with pytest.raises(Interrupted, match=r"finished rows are in .*classification\.rows\.json"):
        made.classify(stop)
    assert not (made.run.path / "classification.json").exists()
    stopped = json.loads((made.run.path / "classification.rows.json").read_text())["rows"]
    assert list(stopped) == ["k-NN 1, latents", "k-NN 3, latents", "MLP, latents", "k-NN 1, metric", "k-NN 3, metric"]
    trained.clear()
    result = made.classify()
    assert len(trained) == 3 * 4  # of three kinds of features, two seeds and two normalisations
    assert result["rows"][:5] == list(stopped.values())
    (made.run.path / "classification.rows.json").write_text("{")
    whole = made.classify()
    assert [{**row, "seconds": 0} for row in whole["rows"]] == [{**row, "seconds": 0} for row in result["rows"]]


def test_rows_of_other_latents_are_not_taken(case):
    made = case(options=dataclasses.replace(FAST, classifiers=("knn",), features=("latents",)))
    first = made.classify()["rows"]
    made.change("test", latents=np.roll(made.latents["test"].latents, 1, axis=0))
    assert made.classify()["rows"][0]["accuracy"] != first[0]["accuracy"]


def test_what_costs_most_is_said_with_the_flag(case, caplog):
    with caplog.at_level("INFO"):
        case(grid=(20, 20)).classify()
    (said,) = (line for line in caplog.messages if "leaves it out" in line)
    assert "the MLP on values has 3.24e+03 parameters and is trained 4 times, 8 epochs on 40 signals" in said
    assert "--config.classify.features=\"('latents', 'metric', 'pca')\" leaves it out" in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classifiers": ()}, "classify.classifiers must not be empty"),
        ({"classifiers": ("svm",)}, "classify.classifiers must be"),
        ({"neighbours": (0,)}, "classify.neighbours must be at least 1"),
        ({"neighbours": (1, 1)}, "classify.neighbours must name each once"),
        ({"hidden": (4, 0)}, "classify.hidden must be at least 1"),
        ({"dropout": 1.0}, r"classify.dropout must be in \[0, 1\)"),
        ({"learning_rate": 0.0}, "classify.learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "classify.weight_decay must not be negative"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(SettingsError, match=message):
        RunSettings.from_dict({"data": {"source": "any"}, "classify": values})


def test_a_data_set_without_labels_is_refused(case):
    made = case()
    made.dataset = dataclasses.replace(made.dataset, task="none", classes=())
    with pytest.raises(RunError, match="made up has no labels to classify by"):
        made.classify()


def test_the_launcher_classifies_a_finished_run_whatever_was_asked_before(finished, tmp_path):
    """With the real store, on real slices; settings of this stage alone do not make it another run."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    asked = {"seeds": 1, "epochs": 2, "hidden": "(8,)", "features": "('latents',)"}
    done = launch(workdir, mode="classify", **{f"classify__{name}": value for name, value in asked.items()})
    assert done.returncode == 0, done.stderr
    (written,) = workdir.glob("variants/classify.*/classification.json")
    result = json.loads(written.read_text())
    assert [row["classifier"] for row in result["rows"]] == ["k-NN, k = 1", "k-NN, k = 3", "MLP"]
    assert result["settings"]["epochs"] == 2
    field, (split,) = workdir / FIELD_FILE, workdir.rglob("test-*.safetensors")
    for break_it, message in (
        (lambda: field.write_bytes(field.read_bytes() + b"another"), "latents of another field"),
        (split.unlink, "no latents of a split 'test' in"),
    ):
        break_it()
        done = launch(workdir, mode="classify")
        assert done.returncode == 1
        assert message in done.stderr.strip().splitlines()[-1]
