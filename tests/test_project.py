"""The project as a whole: what its papers promise is there, what it needs is pinned, and it installs from anywhere."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.cli import app
from pipeline.errors import BYTES_KINDS, WORLD_KINDS
from pipeline.table.schema import SEGMENTS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Torch names the exact versions of these itself, per platform.
PINNED_BY_TORCH = re.compile(r"nvidia-|cuda-|triton\Z")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines), "exact versions only"
    found: dict[str, str] = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def needed(requirements: list[str]) -> set[str]:
    """Names of all that these requirements bring on this machine, as the installed packages say."""
    names: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or key[0] == canonicalize_name(PROJECT["name"]):
            continue
        seen.add(key)
        names.add(key[0])
        for text in metadata.distribution(requirement.name).requires or []:
            inner = Requirement(text)
            extras = [*requirement.extras, ""]
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)
    return names


def all_requirements() -> list[str]:
    return PROJECT["dependencies"] + [text for extra in PROJECT["optional-dependencies"].values() for text in extra]


def test_everything_that_an_install_brings_is_pinned() -> None:
    loose = {name for name in needed(all_requirements()) - pins().keys() if not PINNED_BY_TORCH.match(name)}
    assert not loose, f"not in constraints.txt: {sorted(loose)}"


def test_pins_satisfy_what_the_project_asks_for() -> None:
    found = pins()
    for requirement in map(Requirement, all_requirements()):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), str(requirement)


def test_pins_keep_off_versions_that_break_the_scheduler() -> None:
    found = pins()
    assert tuple(map(int, found["fastapi"].split("."))) < (0, 151)
    assert tuple(map(int, found["sqlalchemy"].split("."))) < (2, 1)


def test_every_make_target_that_is_written_about_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci/run", "examples/demo.py"):
        named = set(re.findall(r"(?:^|`|exec )make ([a-z]+)", read(name), re.M))
        assert named <= targets, f"{name} names {sorted(named - targets)}"
    assert {"demo", "test", "chaos", "check", "bench"} <= targets


def test_every_command_and_option_in_the_readme_exists() -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    groups = [group.commands for group in commands.values() if hasattr(group, "commands")]
    every = [*commands.values(), *(command for group in groups for command in group.values())]
    options = {option for command in every for parameter in command.params for option in parameter.opts}
    readme = re.sub(r"^ *(python|prefect) .*|`python [^`]*`", "", read("README.md"), flags=re.M)
    for name, sub in re.findall(r"maskmill ([a-z]+)(?: ([a-z]+)(?= [A-Z`|]))?", readme):
        assert name in commands, name
        if hasattr(commands[name], "commands") and sub:
            assert sub in commands[name].commands, f"{name} {sub}"
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) - {"--help"}
    assert named <= options, sorted(named - options)


def test_python_calls_in_the_readme_exist() -> None:
    import pipeline

    for name in set(re.findall(r"\bpipeline\.([a-z_]+)\(", read("README.md"))):
        assert callable(getattr(pipeline, name)), name


def test_the_table_page_has_every_column_and_every_kind_of_error() -> None:
    page = read("docs/table.md")
    documented = re.findall(r"^\| ((?:`[a-z_0-9]+`(?:, )?)+) \|", page, re.M)
    names = {name for cell in documented for name in re.findall(r"`([a-z_0-9]+)`", cell)}
    missing = {field.name for field in SEGMENTS} - names
    assert not missing, f"docs/table.md lacks {sorted(missing)}"
    for field in SEGMENTS:
        if pa.types.is_list(field.type):
            inner = {child.name for child in field.type.value_type}
            assert inner <= names, f"docs/table.md lacks {sorted(inner - names)} of {field.name}"
    assert names >= BYTES_KINDS | WORLD_KINDS


def test_links_between_pages_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_decision_is_in_the_index() -> None:
    index = read("docs/decisions/README.md")
    for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert f"]({page.name})" in index, page.name


def test_nothing_that_installs_names_a_package_index() -> None:
    """Where packages come from is the setting of whoever installs: at most a variable stands here."""
    options = r"--(?:extra-)?index-url\b|--find-links\b|--trusted-host\b"
    installing = dict.fromkeys(map(ROOT.joinpath, ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run")), "http")
    # Here the parts of one site reach each other by http://.
    installing |= {
        path: "https" for path in (ROOT / "infra").rglob("*") if path.suffix in ("", ".yaml", ".py", ".json")
    }
    assert ROOT / "infra" / "Dockerfile" in installing
    for path, scheme in installing.items():
        if path.is_file():
            text = re.sub(r'--index-url "\$[A-Z_]+"', "", path.read_text(encoding="utf-8"))
            found = re.findall(rf"{scheme}s?://\S+|{options}", text)
            assert not found, f"{path.relative_to(ROOT)} names {found}"


def test_every_module_says_what_it_owns() -> None:
    for folder in ("models", "pipeline"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not text.strip() or text.startswith('"""'), f"{path.relative_to(ROOT)} has no docstring"
            assert path.stem not in {"utils", "common", "helpers", "base", "manager"}, path.relative_to(ROOT)


def test_a_long_module_says_why() -> None:
    for folder in ("models", "pipeline", "flows", "infra"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            says_why = "Longer than most modules: " in text.partition('"""')[2].partition('"""')[0]
            assert says_why or text.count("\n") <= 400, path.relative_to(ROOT)


def test_flows_stay_thin() -> None:
    bodies = {}
    for path in (ROOT / "flows").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and re.search(
                r"\b(flow|task)\(", str([*map(ast.unparse, node.decorator_list)])
            ):
                assert node.end_lineno is not None
                bodies[node.name] = node.end_lineno - node.body[0].lineno + 1
    assert {"segment_corpus", "train_model", "evaluate_model", "refresh_model"} <= set(bodies)
    assert {name: lines for name, lines in bodies.items() if lines >= 40} == {}


@pytest.mark.parametrize("code", ["import models.card, models.file", "import pipeline", "import pipeline.cli"])
def test_what_every_command_imports_does_not_load_torch(code: str) -> None:
    script = f"import sys, json; {code}; print(json.dumps([m for m in ('torch', 'ray') if m in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(answer.stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_starts(script: Path) -> None:
    """As its page has it: `python benchmarks/NAME.py`, without any path set."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr
