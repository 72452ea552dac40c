"""The documents: Python blocks run, commands are known down to each flag and setting, links lead somewhere.

A fenced block is run unless the line before it says why not: `<!-- not run: needs a GPU -->`. Python blocks of one
document share their names, in order. Commands that are not run are checked against the flags of their module, the
settings of their config and the files they name.
"""

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

import medfuncta_jax as mf
from experiments.settings import RunSettings
from medfuncta_jax.datasets import SOURCES, source_options
from medfuncta_jax.datasets.prepared import prepared_dataset
from medfuncta_jax.settings import DataSettings, dataclass_from_dict
from tests.experiments.command_line import run_module
from tests.experiments.conftest import cache, finished  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md", "CHANGELOG.md", "configs/README.md", "experiments/README.md", "experiments/RESULTS.md",
        "experiments/PERFORMANCE.md", "medfuncta_jax/README.md", "medfuncta_jax/datasets/README.md",
    )
]  # fmt: skip
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*\S) -->")
ANY_COMMENT = re.compile(r"<!--.*-->")


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it starts at, and why it is not run, None if it is."""

    language: str
    text: str
    line: int
    reason: str | None


def blocks(document):
    """All fenced blocks of a document."""
    lines, found, start = document.read_text().splitlines(), [], None
    for i, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = i
            continue
        before = lines[start - 1] if start else ""
        marked = NOT_RUN.fullmatch(before)
        assert marked or not ANY_COMMENT.fullmatch(before), f"{document}:{start}: a mark is <!-- not run: REASON -->"
        text = "\n".join(lines[start + 1 : i]) + "\n"
        found.append(Block(lines[start][3:].strip(), text, start + 2, marked["reason"] if marked else None))
        start = None
    assert start is None, f"{document}:{start}: a block that does not end"
    return found


def prose(document):
    """A document without its blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of a shell block, each as its words, without assignments before them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command.pop(0)
            if command:
                yield command


def each(language):
    """Parameters: every block of a language, by document and line."""
    found = [(document, block) for document in DOCUMENTS for block in blocks(document) if block.language == language]
    return [pytest.param(*one, id=f"{one[0].relative_to(ROOT)}:{one[1].line}") for one in found]


def named(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


# What commands are checked against


def module_file(module):
    """The file of a module that `python -m` runs."""
    place = ROOT / module.replace(".", "/")
    for file in (place.with_suffix(".py"), place / "__main__.py"):
        if file.is_file():
            return file
    raise AssertionError(f"no module {module}")


def flags_of(module):
    """The flags that a module defines, and for each the values that its source lists, None if none are listed."""
    found = {}
    for node in ast.walk(ast.parse(module_file(module).read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        name, first = node.func.attr, node.args[0]
        if not isinstance(first, ast.Constant) or not (name.startswith("DEFINE_") or name == "add_argument"):
            continue
        values = node.args[2] if name == "DEFINE_enum" else None
        listed = isinstance(values, ast.List) and all(isinstance(item, ast.Constant) for item in values.elts)
        found[first.value.lstrip("-")] = [item.value for item in values.elts] if listed else None
    return found


def known_settings():
    """The dotted names of all settings, with the options of every source."""
    names = {f"data.{field.name}" for source in SOURCES for field in dataclasses.fields(source_options(source))}
    for group, values in RunSettings(data=DataSettings("medmnist")).to_dict().items():
        names |= {f"{group}.{name}" for name in values} if isinstance(values, dict) else {group}
    return names


def check_config(config, overrides):
    """Make a config with `--config.GROUP.FIELD=VALUE`, and validate all of it."""
    file, _, variant = config.partition(":")
    assert (ROOT / file).is_file(), f"no config {file}"
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    values = module.get_config(*([variant] if variant else [])).to_dict()
    for override in overrides:
        name, _, text = override.removeprefix("--config.").partition("=")
        *groups, field = name.split(".")
        group = values
        for one in groups:
            group = group[one]
        assert field in group, f"no setting {name}"
        group[field] = text if isinstance(group[field], str) else ast.literal_eval(text)
    settings = RunSettings.from_dict(values)
    dataclass_from_dict(source_options(settings.data.source), dict(settings.data.options), "data")


def check_module(module, words):
    """A command `python -m MODULE WORDS`."""
    if module in ("venv", "pytest"):
        return
    known, config, overrides = flags_of(module), None, []
    for word in words:
        if not word.startswith("--"):
            continue
        name, given, value = word[2:].partition("=")
        if name.startswith("config.") and "config" in known:
            overrides.append(word)
            continue
        assert name in known or name.removeprefix("no") in known, f"{module} has no flag --{name}"
        if name == "config":
            config = value
        elif name == "set":
            for override in value.split(","):
                assert override.partition("=")[0] in known_settings(), f"no setting {override}"
        elif name == "mode" and module == "experiments.main":
            assert value in importlib.import_module(module).MODES, f"no mode {value}"
        elif given and known[name] is not None:
            assert value in known[name], f"--{name}={value} of {module} must be one of {known[name]}"
    if config or overrides:  # a run brings its config with it; any will do to check settings against
        check_config(config or "configs/quickstart.py", overrides)


def check_command(words):
    """Any command of a document; one of a kind that is not known here is refused."""
    program, *rest = words
    match Path(program).name:
        case "python" | "python3" if rest[0] == "-m":
            check_module(rest[1], rest[2:])
        case "medfuncta":
            name = rest.pop(0) if rest[0][0] != "-" else "main"
            tool = (ROOT / "experiments" / "tools" / f"{name}.py").is_file()
            check_module(f"experiments.tools.{name}" if tool else f"experiments.{name}", rest)
        case "sbatch":
            script, config, *rest = [word for word in rest if not re.match("--(?!config)", word)]
            assert (ROOT / script).is_file(), f"no script {script}"
            check_config(config, [word for word in rest if word.startswith("--config.")])
        case "pip" if rest[0] == "install":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = [name for word in rest for name in ",".join(re.findall(r"\[(.*)\]", word)).split(",") if name]
            assert set(asked) <= set(extras), f"extras {asked}, there are {sorted(extras)}"
        case "export":
            pass
        case _:
            raise AssertionError(f"no test knows the command {shlex.join(words)}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=named(DOCUMENTS))
def test_every_block_is_of_a_language_that_is_tested_or_is_text(document):
    assert {block.language for block in blocks(document)} <= {"python", "bash", "text"}
    assert all(block.reason is None for block in blocks(document) if block.language == "text")


@pytest.mark.parametrize(("document", "block"), each("bash"))
def test_commands_are_known(document, block):
    del document
    assert list(commands(block.text))
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m experiments.absent", "python -m experiments.main --modus=all",
        "python -m experiments.main --mode=none", "python -m experiments.main --config=configs/absent.py",
        "python -m experiments.main --config=configs/quickstart.py --config.train.stepz=1",
        "python -m experiments.main --config=configs/quickstart.py --config.train.steps=-1",
        "python -m experiments.main --config=configs/quickstart.py --config.data.flag=chestmnist",
        "python -m experiments.main --config=configs/chest_xray.py:99", "pip install -e '.[absent]'",
        "python -m experiments.tools.benchmark --case=2d --mode=guess",
        "python -m experiments.tools.benchmark --set=model.widht=1",
        "sbatch experiments/slurm/absent.sh configs/ecg.py", "absent --help",
    ],
)  # fmt: skip
def test_wrong_commands_are_found(wrong):
    (words,) = commands(wrong)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_command(words)


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):  # noqa: F811
    """A folder to run documents in, with a small finished run as `runs/quickstart`."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(finished, folder / "runs/quickstart")
    return folder


@pytest.mark.parametrize(("document", "block"), [one for one in each("bash") if one.values[1].reason is None])
def test_commands_run(document, block, place):
    del document
    for program, option, module, *words in commands(block.text):
        assert (program, option) == ("python", "-m"), "this command needs a mark, with the reason why it is not run"
        done = run_module(module, *(word.replace("runs/", f"{place}/runs/") for word in words))
        assert done.returncode == 0, done.stderr


def run_blocks(document, names):
    for block in blocks(document):
        if block.language == "python" and block.reason is None:
            code = compile("\n" * (block.line - 1) + block.text, document, "exec")
            exec(code, names)
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=named(DOCUMENTS))
def test_python_runs(document, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(ROOT)
    run_blocks(document, {"__name__": "document"})


@pytest.mark.parametrize(("document", "block"), each("python"))
def test_python_is_python(document, block):
    compile(block.text, document, "exec")


def test_the_written_source_is_one(tmp_path, place, monkeypatch):
    monkeypatch.chdir(place)
    names = run_blocks(ROOT / "medfuncta_jax/datasets/README.md", {"__name__": "document"})
    images = np.random.default_rng(0).random((6, 8, 8))
    (tmp_path / "data").mkdir()
    for i, image in enumerate(images):
        np.save(tmp_path / f"data/{i}.npy", image)
    np.save(tmp_path / "data/large.npy", 2 * images[0])
    plan = names["plan"](names["Options"](size=8), data_dir=str(tmp_path / "data"), cache_root=tmp_path)
    dataset = prepared_dataset(plan, tmp_path / "cache")
    found = {row["id"]: row["signal"][..., 0] for split in dataset.splits.values() for row in split}
    assert set(found) == {f"{i}.npy" for i in range(6)}
    for i, image in enumerate(images):
        np.testing.assert_array_equal(found[f"{i}.npy"], image.astype(np.float32))


def test_the_readme_is_short_and_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    install, test = (block.text for block in blocks(ROOT / "README.md")[:2])
    assert "python -m experiments.main --config=configs/quickstart.py" in install
    ci = (ROOT / ".ci/run").read_text()
    for part in ("-e '.[dev]'", ".venv/bin/python -m pytest"):
        assert part in test
        assert re.sub(r"^\.venv", "", part) in ci


# Prose

LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)|src=\"([^\"]+)\"")
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def anchors(document):
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named(DOCUMENTS))
def test_links_lead_somewhere(document):
    for link in (first or second for first, second in LINK.findall(prose(document))):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target / "README.md" if target.is_dir() else target), f"no heading for {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named(DOCUMENTS))
def test_names_in_the_text_exist(document):
    settings, groups = known_settings(), "|".join(RunSettings(data=DataSettings("medmnist")).to_dict())
    for code in CODE.findall(prose(document)):
        if name := re.match(rf"(?:--config\.)?((?:{groups})\.[a-z_]+)(?![\w(])", code):
            is_file = re.search(r"\.(py|md|json|csv)$", name[1])
            assert is_file or name[1] in settings, f"no setting {name[1]}"
        if re.fullmatch(r"experiments(\.\w+)+", code):
            module_file(code)
        if re.fullmatch(r"[\w./]+\.(py|sh)", code):
            inside = [ROOT / part for part in ("medfuncta_jax", "experiments", "configs", "tests")]
            assert any((ROOT / code).exists() or list(part.rglob(code)) for part in inside), f"no file {code}"
        if name := re.match(r"mf\.(\w+)", code):
            assert hasattr(mf, name[1]), f"no {code}"


# Files that other programs read


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text()
    paper = citation["preferred-citation"]
    cited = (ROOT / "README.md").read_text().partition("## Citing")[2]
    assert all(author["family-names"] in cited for author in paper["authors"])
    assert paper["title"] in " ".join(cited.split())


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["run"]["steps"]
    files = [word for word in workflow["jobs"]["torch"]["steps"][-1]["run"].split() if word.startswith("tests/")]
    assert len(files) >= 4
    assert all("torch" in (ROOT / file).read_text() for file in files)
