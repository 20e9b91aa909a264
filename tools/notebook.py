"""The quickstart notebook: run it (``python tools/notebook.py``), and its page for the site.

Run, it executes in a temporary folder and its outputs are saved into the file. mkdocs loads this
file as a hook, which turns each notebook of the documentation into a page; nothing is executed.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def execute(path: Path, folder: Path) -> Any:
    """Run a notebook's cells in ``folder``, from the first; returns it with their outputs.

    Raises nbclient's CellExecutionError for a cell that fails.
    """
    nbformat: Any = import_module("nbformat")  # untyped
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def as_markdown(notebook: dict[str, Any]) -> str:
    """A notebook as a page: its text, its code and the texts that it printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
                continue
            text = "".join(output.get("text") or data.get("text/plain", "")).rstrip()
            if text:
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: a page for each notebook, which stays a file to download."""
    from mkdocs.structure.files import File

    for file in list(files):
        if not file.src_uri.endswith(".ipynb"):
            continue
        notebook = json.loads(Path(file.abs_src_path).read_text(encoding="utf-8"))
        content = as_markdown(notebook) + f"\n[Download this notebook]({Path(file.src_uri).name})\n"
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=content))
    return files


def main() -> None:
    nbformat: Any = import_module("nbformat")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(NOTEBOOK, Path(folder))
    nbformat.write(notebook, NOTEBOOK)
    print(NOTEBOOK)


if __name__ == "__main__":
    main()
