"""A mkdocs hook that makes documentation pages from the code: public names, files of the package, and options."""

import ast
import importlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/repa"
sys.path.insert(0, str(ROOT / "src"))

ROOMS = (
    "alignment", "analysis", "autoencoders", "conditions", "data", "diffusion", "encoders", "evaluation", "metrics", "models",
    "report", "runs", "sampling", "training",
)  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference/options.md", content=options_page()))
    files.append(File.generated(config, "reference/package.md", content=package_page()))
    for room in ROOMS:
        files.append(File.generated(config, f"reference/{room}.md", content=room_page(room)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Convert equations to MathML, and replace links to repository files by their path: the site contains only pages."""

    def outside(match: re.Match) -> str:
        inside = (ROOT / "docs" / page.file.src_uri).parent.joinpath(match[2].partition("#")[0]).resolve()
        return match[0] if inside.is_relative_to(ROOT / "docs") else f"{match[1]} (`{inside.relative_to(ROOT)}`)"

    markdown = re.sub(r"^```math\n(.*?)^```$", equation, markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)", outside, markdown)


def equation(block: re.Match) -> str:
    """A ```math block of LaTeX, which code hosts render too, as MathML, which browsers render without a script."""
    return f'<div class="equation">{latex2mathml.converter.convert(block[1].strip(), display="block")}</div>'


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Refuse lists that Markdown read as text, as it does after a table or paragraph indented by two spaces."""
    if re.search(r"<p>[^<]*(<(?!/p>)[^<]*)*\n\* ", html):
        raise PluginError(f"{page.file.src_uri} has a list read as text: indent the paragraph above it by four spaces.")
    return html


def room_page(room: str) -> str:
    """One heading per public name; mkdocstrings reads the docstrings from the source."""
    module = importlib.import_module(f"repa.{room}")
    lines = [f"# repa.{room}", "", inspect.getdoc(module) or "", ""]
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
        elif hasattr(value, "names"):  # a registry
            entries = ", ".join(f"`{entry}`" for entry in value.names())
            lines += [f"## {name}", "", f"Registry of {value.kind}s: {entries}.", ""]
    return "\n".join(lines)


def package_page() -> str:
    """The files of the package by room, each with the first line of its docstring."""
    lines = [
        "# Files of the package",
        "",
        "Generated from the docstrings. [Architecture](../architecture.md) describes the rooms.",
    ]
    for room in sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()):
        lines += ["", f"## {room.name}", "", first_line(room / "__init__.py"), "", "| file | |", "|---|---|"]
        for path in sorted(room.rglob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"| `{path.relative_to(room)}` | {first_line(path).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if docstring is None:
        raise SystemExit(f"{path} has no docstring: write one, because the table of files shows its first line.")
    return docstring.splitlines()[0]


def options_page() -> str:
    """All options of `repa train` and `repa prepare` with their descriptions, in one table per group."""
    from repa.data.config import PrepareConfig
    from repa.training.config import TrainConfig

    lines = [
        "# Options",
        "",
        '<div class="options"></div>',  # docs/site.css does not wrap option names after it
        "",
        "Generated from the configuration classes. `repa train RECIPE --help` prints them with the recipe's values.",
    ]
    for verb, cls in (("train", TrainConfig), ("prepare", PrepareConfig)):
        lines += ["", f"## repa {verb}"]
        groups = defaultdict(list)
        for flag, default, about in fields(cls):
            groups[flag.partition(".")[0] if "." in flag else ""].append(f"| `--{flag}` | {cell(default)} | {about} |")
        for group in sorted(groups, key=bool):  # options without a group come first
            heading = ["", f"### {group}"] if group else []
            lines += [*heading, "", "| option | default | meaning |", "|---|---|---|", *groups[group]]
    return "\n".join(lines)


def fields(cls: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any, str]]:
    for name, field in cls.model_fields.items():
        flag = above + name.replace("_", "-")
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if inspect.isclass(part)]
        nested = next((part for part in inner if issubclass(part, BaseModel)), None)
        if nested is not None:
            many = nested is not field.annotation
            yield from fields(nested, f"{flag}.{'0.' if many else ''}")
        else:
            about = (field.description or "").replace("|", "\\|").replace("\n", " ")
            yield flag, field.get_default(call_default_factory=True), about


def cell(default: Any) -> str:
    if default is None or default == "" or default == () or "Undefined" in repr(default):
        return ""
    return f"`{default}`"
