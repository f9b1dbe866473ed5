"""What the documents say must be so: commands, settings, links, paths, versions, options."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
import ujson

from ai4all import __version__
from ai4all.backend import registry
from ai4all.cli import app
from ai4all.commands.failure import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE
from ai4all.config import Settings, explain
from ai4all.data_dir_lock import LOCK_FILE
from ai4all.first_run import DIRECTORIES, MARKER, WORKER_ID
from ai4all.logs import LOG_FILE

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIN = tomllib.loads((ROOT / "vendor/llama.cpp.toml").read_text(encoding="utf-8"))
PRESETS = ujson.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")

# Made by a build or a run, so not in every checkout.
MADE = ("build/", "vendor/llama.cpp/", "benchmarks/", "models/", "cache/", "logs/")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_ROW = re.compile(r"^\|(.+)\|$", re.MULTILINE)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Commands.


def shell_lines(text: str) -> Iterator[str]:
    for language, body in _FENCE.findall(text):
        if language == "sh":
            yield from body.splitlines()
        elif language == "ini":
            for line in body.splitlines():
                key, _, value = line.partition("=")
                if key == "ExecStart":
                    yield value
    yield from _SPAN.findall(without_fences(text))


def our_commands(text: str) -> Iterator[list[str]]:
    """The arguments of each call of ours that a document shows."""
    for line in shell_lines(text):
        if "ai4all-native" not in line:
            continue
        for part in re.split(r"&&|\|", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
                words = words[1:]
            if words and Path(words[0]).name == "ai4all-native":
                yield words[1:]


def faults_of(arguments: list[str]) -> list[str]:
    """What the command line would not take of ``arguments``; nothing is run."""
    command: Any = typer.main.get_command(app)
    n_given = 0
    words = iter(arguments)
    for word in words:
        if word.startswith("-"):
            options = {name: each for each in command.params for name in each.opts}
            if word == "--help":
                continue
            if word not in options:
                return [f"{command.name} has no {word}"]
            if not options[word].is_flag and next(words, None) is None:
                return [f"{word} has no value"]
        elif hasattr(command, "commands"):
            if word not in command.commands:
                return [f"{command.name} has no command {word}"]
            command = command.commands[word]
        else:
            n_given += 1
    n_taken = sum(each.param_type_name == "argument" for each in command.params)
    return [] if n_given <= n_taken else [f"{command.name} takes {n_taken} arguments"]


def leaf_commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not hasattr(command, "commands"):
        yield path
        return
    for name, inner in command.commands.items():
        yield from leaf_commands(inner, (*path, name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_commands_that_are_shown_exist(document: Path) -> None:
    shown = list(our_commands(document.read_text(encoding="utf-8")))
    assert [fault for arguments in shown for fault in faults_of(arguments)] == []


def test_every_command_is_shown() -> None:
    shown = [words for path in DOCUMENTS for words in our_commands(path.read_text("utf-8"))]
    for path in leaf_commands(typer.main.get_command(app)):
        assert any(tuple(words[: len(path)]) == path for words in shown), path


@pytest.mark.parametrize(
    "arguments", ["workers", "demo --taks 3", "models fetch", "schema now", "demo --tasks"]
)
def test_a_command_that_does_not_exist_would_be_found(arguments: str) -> None:
    assert faults_of(arguments.split()) != []


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_extras_that_are_shown_exist(document: Path) -> None:
    extras = PROJECT["project"]["optional-dependencies"].keys()
    for group in re.findall(r"'\.\[([\w,-]+)\]'", document.read_text(encoding="utf-8")):
        assert set(group.split(",")) <= extras


def test_exit_statuses() -> None:
    expected = {"0", str(EXIT_FAILURE), str(EXIT_USAGE), str(EXIT_INTERRUPTED)}
    for document in ("README.md", "docs/operating.md"):
        section = text_of(document).partition("## Exit status")[2].partition("\n## ")[0]
        assert {row.split("|")[0].strip() for row in _ROW.findall(section)[2:]} == expected


# Settings.


def test_every_setting_has_its_row() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_settings_table.py"))
    text = text_of("docs/operating.md")
    assert script["table"]() in text, "run: python docs/make_settings_table.py"
    assert script["with_table"](text) == text
    assert text.count("| `worker.model` |") == 1


def test_settings_of_the_example_exist() -> None:
    keys = {row.key for row in explain(Settings())}
    (example,) = [
        body for language, body in _FENCE.findall(text_of("README.md")) if language == "toml"
    ]
    tables = tomllib.loads(example)
    assert {f"{section}.{key}" for section, table in tables.items() for key in table} <= keys


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_settings_and_variables_in_the_text_exist(document: Path) -> None:
    keys = {row.key for row in explain(Settings())}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    text = document.read_text(encoding="utf-8")
    for span in _SPAN.findall(without_fences(text)):
        # A file may be called like a section.
        setting = re.fullmatch(r"((\w+)\.(?!py$|h$)\w+)( = \w+)?", span)
        if setting is not None and setting[2] in sections:
            assert setting[1] in keys, span
    variables = {"AI4ALL_" + key.upper().replace(".", "_") for key in keys}
    in_ci = set(re.findall(r"\bAI4ALL_COMPARE_\w+", text_of(".ci/run")))
    others = {"AI4ALL_CONFIG", "AI4ALL_TEST_MODEL", *in_ci, *build_options()}
    assert set(re.findall(r"\bAI4ALL_[A-Z0-9_]*[A-Z0-9]\b", text)) <= variables | others


def test_the_data_directory_is_drawn_in_full() -> None:
    text = text_of("docs/operating.md").partition("## What is stored")[2].partition("\n## ")[0]
    for name in (
        MARKER,
        WORKER_ID,
        LOCK_FILE,
        LOG_FILE,
        "config.toml",
        *(f"{each}/" for each in DIRECTORIES),
    ):
        assert f"\n{name}" in text or f"/{name} " in text, name


# Links and paths.


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in _LINK.findall(without_fences(document.read_text(encoding="utf-8"))):
        if "://" in link:
            assert link.startswith("https://"), link
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_paths_in_the_text_exist(document: Path) -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for span in _SPAN.findall(without_fences(document.read_text(encoding="utf-8"))):
        if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", span) and not span.startswith(MADE):
            top = span.partition("/")[0]
            assert top not in tops or (ROOT / span).exists(), span


def test_the_picture_stands_alone() -> None:
    picture = ElementTree.parse(ROOT / "docs/demo.svg")
    text = "".join(picture.getroot().itertext()).replace("\xa0", " ")
    assert "$ ai4all-native demo" in text
    assert len(set(re.findall(r"demo-\d", text))) == 3
    raw = text_of("docs/demo.svg")
    assert set(re.findall(r"url\((.)", raw)) <= {"#"}
    assert "href" not in raw


# Versions.


def test_the_python_floor_is_one() -> None:
    floor = re.fullmatch(r">=(3\.\d+)", PROJECT["project"]["requires-python"])
    assert floor is not None
    version = floor[1]
    minor = version.partition(".")[2]
    classifiers = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert min(map(int, classifiers)) == int(minor)
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{minor}"
    assert set(re.findall(r"find_package\(Python (\S+) ", CMAKE)) == {version}
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert f"< (3, {minor})" in script
    for document in DOCUMENTS:
        for named in re.findall(r"Python (3\.\d+)", document.read_text(encoding="utf-8")):
            assert named == version, document.name


def test_the_cmake_floor_is_one() -> None:
    floor = re.search(r"cmake_minimum_required\(VERSION (\d+)\.(\d+)", CMAKE)
    assert floor is not None
    declared = PRESETS["cmakeMinimumRequired"]
    assert (declared["major"], declared["minor"]) == (int(floor[1]), int(floor[2]))
    assert PROJECT["tool"]["scikit-build"]["cmake"]["version"] == "CMakeLists.txt"
    named = [
        version
        for path in DOCUMENTS
        for version in re.findall(r"CMake \(?(\d+\.\d+)", path.read_text("utf-8"))
    ]
    assert named
    assert set(named) == {f"{floor[1]}.{floor[2]}"}


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## \[([^\]]+)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert first is not None
    assert first[1] == __version__


def test_the_pin_is_named_as_it_is() -> None:
    text = text_of("docs/building.md")
    assert set(re.findall(r"llama-cpp-python==([\w.]+)", text)) == {PIN["version"]}
    assert set(re.findall(r"llama_cpp_python-([\d.]+)\.tar\.gz", text)) == {PIN["version"]}
    assert PIN["member_prefix"].startswith(f"llama_cpp_python-{PIN['version']}/")


def test_build_requirements_are_named_in_full() -> None:
    (line,) = re.findall(
        r"^pip install ('scikit-build-core.*)$", text_of("CONTRIBUTING.md"), re.MULTILINE
    )
    others = [each for each in PROJECT["build-system"]["requires"] if not each.startswith("pip")]
    assert shlex.split(line) == [*others, "cmake", "ninja"]


# Options of the build.


def build_options() -> dict[str, str]:
    """Our options and their defaults."""
    switches = re.findall(r'^option\((AI4ALL_\w+) "[^"]*" (\w+)\)', CMAKE, re.MULTILINE)
    texts = re.findall(r'^set\((AI4ALL_\w+) "([^"]*)" CACHE', CMAKE, re.MULTILINE)
    return dict(switches + texts)


def upstream_options() -> set[str]:
    """Options that the pinned llama.cpp has."""
    source = ROOT / "vendor/llama.cpp"
    assert source.is_dir(), "the pinned source is not here; run: python vendor/sync.py"
    files = [source / "CMakeLists.txt", source / "ggml/CMakeLists.txt"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return set(re.findall(r"^\s*(?:option|set) ?\(((?:GGML|LLAMA|BUILD)_\w+)", text, re.MULTILINE))


def test_our_options_have_their_rows() -> None:
    section = text_of("docs/building.md").partition("## Options")[2].partition("\n## ")[0]
    rows = [[cell.strip(" `") for cell in row.split("|")] for row in _ROW.findall(section)[2:]]
    assert {name: default for name, default, _ in rows} == build_options()


def test_presets_set_known_options_only() -> None:
    known = (
        build_options().keys()
        | upstream_options()
        | {
            "CMAKE_BUILD_TYPE",
            "CMAKE_C_FLAGS_RELWITHDEBINFO",
            "CMAKE_CXX_FLAGS_RELWITHDEBINFO",
        }
    )
    for preset in PRESETS["configurePresets"]:
        assert preset.get("cacheVariables", {}).keys() <= known, preset["name"]


def test_defaults_of_ours_are_options_of_the_pinned_source() -> None:
    lists = re.findall(r"foreach\(_default IN ITEMS ([^)]+)\)", CMAKE)
    assert len(lists) == 1
    assert set(lists[0].split()) <= upstream_options()


def test_options_that_are_shown_exist() -> None:
    known = build_options().keys() | upstream_options()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"cmake\.define\.(\w+)=", text):
            assert name in known or name.startswith("CMAKE_"), name


def test_the_sanitizers_commands_build_every_native_test() -> None:
    sources = (ROOT / "tests/native").glob("*.cpp")
    programs = {path.stem for path in sources if "int main(" in path.read_text()}
    for page in ("CONTRIBUTING.md", "docs/building.md"):
        command = re.search(r"--build --preset cpu-asan --target ([\w ]+)", text_of(page))
        assert command is not None
        assert set(command[1].split()) == programs | {"tiny_model"}, page


def test_every_preset_and_target_has_its_row() -> None:
    building = text_of("docs/building.md")
    for preset in PRESETS["configurePresets"]:
        assert preset.get("hidden") or f"`{preset['name']}`" in building
    for target in registry.targets(registry.capabilities()):
        assert f"`target {target.name}`" in building
        option = re.search(r"cmake\.define\.(\w+)=ON", target.reason)
        # What a Mac has by default needs no option there.
        if option is not None and option[1] != "GGML_METAL":
            assert option[0] in building
            assert option[0] in text_of("README.md")
