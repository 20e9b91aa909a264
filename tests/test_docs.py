"""Documentation: names that exist, generated pages up to date, a site without outside files."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml
from conftest import ROOT

from dsbs import errors
from dsbs.cli import app
from dsbs.config import LocalTeacherSection
from dsbs.config.registry import TERMS, entry
from dsbs.config.schema import section_of, sections
from dsbs.config.terms import TermSettings
from dsbs.records import Annotation, Prediction
from dsbs.records.measures import Cascade, CascadePoint, Measure, Selective
from dsbs.records.results import (
    Bin,
    BreakEven,
    Comparison,
    FloorComparison,
    LabelEfficiency,
    Latency,
    PartResult,
    Results,
    SystemResult,
)
from dsbs.records.reviews import CorrectedAccuracy, Review, ReviewedSplit

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECTIONS = sections()
STUDENTS = ("minilm", "t5")  # names in examples
NO_KEYS = {
    "teacher.completion",  # a field of a row
    "train.learnig_rate",  # the tutorial's mistakes
    "teacher.max_token",
}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(page: Path) -> Iterator[str]:
    """What stands in code: the lines of blocks, and the spans in the text."""
    text = page.read_text(encoding="utf-8")
    blocks = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for block in blocks.findall(text):
        yield from block.splitlines()
    rest = blocks.sub("", text)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from re.findall(r"`([^`\n]+)`", rest)


@pytest.mark.parametrize(
    ("name", "page"), [("recipe_reference", "recipe-reference"), ("command_reference", "commands")]
)
def test_a_generated_page_is_what_its_tool_writes(name: str, page: str) -> None:
    committed = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert committed == tool(name).page(), f"run: python tools/{name}.py"


def test_the_table_of_errors_is_that_of_the_code() -> None:
    text = (DOCS / "teachers.md").read_text(encoding="utf-8")
    assert tool("error_table").page(text) == text, "run python tools/error_table.py"


def test_the_recipe_reference_has_every_key_with_its_meaning() -> None:
    text = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    rows = {
        match[1]: match[2]
        for match in re.finditer(r"^\| `([a-z_.]+)` \|.*\| (.*) \|$", text, re.MULTILINE)
    }
    keys = {
        f"{path}.{name}".removeprefix(".")
        for path, section in SECTIONS.items()
        for name in section.model_fields
        if not (path.startswith("train.terms.") and name in TermSettings.model_fields)
        and not path.startswith("student.NAME")  # its keys are those of student and train
    }
    assert set(rows) == keys
    assert [key for key, meaning in rows.items() if not meaning.strip()] == []


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def pages(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        else:
            for inner in node.values() if isinstance(node, dict) else node:
                yield from pages(inner)

    written = [str(page.relative_to(DOCS)) for page in PAGES]
    assert sorted(pages(nav)) == sorted([*written, "notebooks/quickstart.md"])


def measured_figures() -> Iterator[tuple[str, str]]:
    """The figures of the README's table, each with its row."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## What was measured", 1)[1].split("\n\n", 2)[1]
    for row in table.splitlines()[2:]:
        shown = re.sub(r"\]\(.*?\)|`.*?`", "", row)
        for figure in re.findall(r"[−+]?\d[\d,]*(?:\.\d+)?", shown):
            yield figure.rstrip(",").lstrip("+"), row


def test_every_figure_of_the_readme_is_on_a_page_of_results() -> None:
    pages = [DOCS / "benchmarks.md", *(DOCS / "results").glob("*.md")]
    words = " ".join(page.read_text(encoding="utf-8") for page in pages)
    missing = [
        (figure, row[:60])
        for figure, row in measured_figures()
        if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d)", words)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    for line in code(page):
        for name, rest in re.findall(
            r"(?:^|[\s$|(])(?:dsbs|-m dsbs) ([a-z][a-z-]*)((?:(?! dsbs | \| |#|\)|;|&).)*)", line
        ):
            assert name in COMMANDS, f"{page.name}: dsbs {name}"
            options = {option for param in COMMANDS[name].params for option in param.opts}
            for option in re.findall(r"(?<=\s)--[a-z-]+", rest):
                assert option in options, f"{page.name}: dsbs {name} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipe_keys_that_a_page_names_exist(page: Path) -> None:
    """`train.seeds`, `train.seeds=[0, 1]`, `train.select: {min_vote: 0.6}`, and blocks of YAML."""
    tops = "|".join(name for name in SECTIONS if name and "." not in name)
    for line in code(page):
        for path, after in re.findall(
            rf"(?<![\w./-])((?:{tops})(?:\.[a-z_]+)+)(?![\w(])((?:: ?\{{.*?\}})?)", line
        ):
            if path in NO_KEYS or path.endswith((".json", ".jsonl", ".html")):
                continue
            wrong = unknown_in(path.split("."), after.lstrip(": "))
            assert wrong is None, f"{page.name}: {wrong} ({line})"
    for block in re.findall(
        r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        data = yaml.safe_load(block.replace("  …\n", ""))
        for key, value in data.items():
            if key in SECTIONS:  # a prompt file has other keys
                for path in leaves(value, (key,)):
                    assert unknown_in(path, "") is None, f"{page.name}: {'.'.join(path)}"


def test_the_terms_and_local_teachers_that_pages_show_are_valid() -> None:
    shown = []
    for page in PAGES:
        for block in re.findall(
            r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            train = yaml.safe_load(block.replace("  …\n", "")).get("train") or {}
            terms = [
                entry(TERMS, term["kind"]).model_validate(term) for term in train.get("terms", ())
            ]
            teachers = [
                LocalTeacherSection.model_validate(item) for item in train.get("teachers", ())
            ]
            assert bool(teachers) == any(term.needs_teacher for term in terms), (
                f"{page.name}: {train}"
            )
            learned = {
                name for method in train.get("methods", ()) for name in method.split("+")[1:]
            }
            assert learned == {term.title for term in terms}, f"{page.name}: {train}"
            shown += terms
    assert {"response", "labels"} <= {term.kind for term in shown}


def leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    section = SECTIONS.get(".".join(path))
    if section is not None and isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    else:
        yield path


def unknown_in(path: list[str] | tuple[str, ...], inner: str) -> str | None:
    """The first key of a path, and of the mapping after it, that the recipe does not have."""
    if path[0] == "student" and path[1:2] and path[1] in STUDENTS:
        path = ["student", "NAME", *path[2:]]
    if tuple(path[:2]) == ("task", "fields"):
        path = [*path[:2], *path[3:]]  # without the name of a field to extract
    section = SECTIONS[path[0]]
    for i, key in enumerate(path[1:], 2):
        if ".".join(path[:i]) in SECTIONS:  # also a kind of term: train.terms.response
            section = SECTIONS[".".join(path[:i])]
            continue
        if key not in section.model_fields:
            return ".".join(path[:i])
        annotation = section.model_fields[key].annotation
        nested = section_of(annotation)
        if nested is None:
            choices = (annotation, *union_of(annotation))
            free = any(get_origin(choice) is dict for choice in choices)
            return None if i == len(path) or free else ".".join(path[: i + 1])
        section = nested
    for key in yaml.safe_load(inner) if inner.startswith("{") else ():
        if key not in section.model_fields:
            return f"{'.'.join(path)}.{key}"
    return None


def union_of(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()


def documented_fields(heading: str) -> list[str]:
    """The names in the first column of the table below a heading of files.md."""
    text = (DOCS / "files.md").read_text(encoding="utf-8")
    chapter = text.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    return [
        name
        for line in chapter.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]


@pytest.mark.parametrize(
    ("heading", "row"),
    [
        ("## annotate/&lt;split&gt;.jsonl", Annotation),
        ("## eval/predictions/&lt;name&gt;.jsonl", Prediction),
        ("## review/&lt;split&gt;.jsonl", Review),
        ("### Results", Results),
        ("### SystemResult", SystemResult),
    ],
)
def test_the_fields_of_a_file_are_told_and_no_others(heading: str, row: Any) -> None:
    fields = [field.alias or name for name, field in row.model_fields.items()]
    assert sorted(documented_fields(heading)) == sorted(fields)


def test_the_fields_of_the_results_parts_are_told_and_no_others() -> None:
    text = (DOCS / "files.md").read_text(encoding="utf-8").partition("### Nested records")[2]
    documented: dict[str, list[str]] = {}
    chapter = ""
    for line in text.splitlines():
        cells = line.split("|")
        if len(cells) > 3 and "`" in cells[2]:
            chapter = cells[1].strip() or chapter
            documented.setdefault(chapter, []).extend(re.findall(r"`(\w+)`", cells[2]))
    expected = {
        record.__name__: list(record.model_fields)
        for record in (
            Measure,
            Comparison,
            FloorComparison,
            Bin,
            Latency,
            LabelEfficiency,
            PartResult,
            BreakEven,
            Selective,
            Cascade,
            CascadePoint,
            ReviewedSplit,
            CorrectedAccuracy,
        )
    }
    assert {name: sorted(fields) for name, fields in documented.items()} == {
        name: sorted(f) for name, f in expected.items()
    }


def test_every_reason_of_rejection_is_told() -> None:
    from dsbs.records import Reason

    assert sorted(fields_in_kebab("### Rejection reasons")) == sorted(get_args(Reason))


def fields_in_kebab(heading: str) -> list[str]:
    text = (
        (DOCS / "files.md").read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
    )
    return re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)


def test_every_exit_code_is_told() -> None:
    table = (
        (DOCS / "commands.md")
        .read_text(encoding="utf-8")
        .partition("| exit code |")[2]
        .partition("\n\n")[0]
    )
    documented = set(re.findall(r"^\| (\d+) \|", table, re.MULTILINE))
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.DsbsError)
    ]
    assert documented == {"0", "130", *(str(kind.exit_code) for kind in kinds)}


# --- the built site


class _Page(HTMLParser):
    """Ids, links, and what a browser fetches by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.ids |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag in ("script", "img", "iframe", "source", "embed") and "src" in attributes:
            self.fetched.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in (
            "stylesheet",
            "icon",
            "preconnect",
            "preload",
            "prefetch",
            "dns-prefetch",
        ):
            self.fetched.append(attributes["href"])


def test_the_notebook_runs_as_it_is_written(tmp_path: Path) -> None:
    """Offline, from an empty folder; its outputs are committed, and name no path of a machine."""
    notebook = tool("notebook")
    committed = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))
    made = notebook.execute(notebook.NOTEBOOK, tmp_path)
    for cell, again in zip(committed["cells"], made.cells, strict=True):
        kinds = [output["output_type"] for output in cell.get("outputs", ())]
        assert kinds == [output["output_type"] for output in again.get("outputs", ())]
        text = json.dumps(cell.get("outputs"))
        assert not re.search(r"/(home|root|tmp|Users|usr|work)/|site-packages|Warning", text)
    page = notebook.as_markdown(committed)
    assert "```python\n" in page and "label accuracy" in page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, _Page]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return {
        path: _Page(path.read_text(encoding="utf-8"))
        for path in folder.rglob("*.html")
        if path.name != "404.html"
    }


def test_pictures_of_commands_are_drawn_and_load_nothing(tmp_path: Path) -> None:
    images = tool("terminal_images")
    output = "about 3 s left\n" + "\n".join(f"line {i}" for i in range(50))
    images.draw(["train", "tickets.yaml"], output, tmp_path / "train.svg")
    svg = (tmp_path / "train.svg").read_text(encoding="utf-8")
    assert "tickets.yaml" in svg and "line&#160;3" in svg
    assert "line&#160;40" not in svg and "left" not in svg
    for picture in [tmp_path / "train.svg", *(DOCS / "images").glob("*.svg")]:
        assert not re.search(r"url\(.?http|href=", picture.read_text(encoding="utf-8")), picture
    assert {picture.stem for picture in (DOCS / "images").glob("*.svg")} >= set(images.SHOWN)


def test_links_between_pages_lead_to_a_page_and_a_heading(site: dict[Path, _Page]) -> None:
    assert {path.stem for path in site} == {page.stem for page in PAGES} | {"quickstart"}
    broken = []
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                (path.parent / unquote(parts.path)).resolve()
                if parts.path and parts.path != "."
                else path
            )
            anchor = unquote(parts.fragment)
            if target.is_dir():
                target = target / "index.html"
            if target.suffix == ".ipynb" and target.is_file():
                continue
            if target not in site or (anchor and anchor not in site[target].ids):
                broken.append(f"{path.name}: {link}")
    assert not broken, "\n".join(broken)


def test_the_site_fetches_nothing_from_elsewhere(site: dict[Path, _Page]) -> None:
    for path, page in site.items():
        assert page.fetched, path
        for address in page.fetched:
            parts = urlsplit(address)
            assert not parts.netloc and parts.scheme in ("", "data"), f"{path.name}: {address}"
            assert parts.scheme or (path.parent / unquote(parts.path)).is_file(), (
                f"{path.name}: {address}"
            )
    for style in path.parent.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), (
            style
        )
