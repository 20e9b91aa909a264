"""``predict.py`` of decoder-only students: the prompts are made in the same lines whatever runs the model."""

from __future__ import annotations

from dsbs.students import Student

_SCRIPT = '''"""Prints what the student writes to each line of stdin."""
import json
import sys
from pathlib import Path

{imports}

here = Path(__file__).resolve().parent
wording = json.loads((here / "wording.json").read_text(encoding="utf-8"))
whole, apart = (tokenizers.Tokenizer.from_file(str(here / "tokenizer.json")) for _ in range(2))
apart.encode_special_tokens = True  # special tokens are the wording's alone
head, tail = (whole.encode(wording[part], add_special_tokens=False).ids for part in ("head", "tail"))
{load}
for line in sys.stdin:
    text = {prefix} + line.strip()
    ids = whole.encode(wording["head"] + text + wording["tail"], add_special_tokens=False).ids
    if len(ids) > {longest} or any(token in text for token in wording["special"]):
        ids = head + apart.encode(text, add_special_tokens=False).ids[: {longest} - len(head + tail)] + tail
{write}
'''


def causal_script(student: Student, *, imports: str, load: str, write: str) -> str:
    """Of the runtime's own lines: ``imports``, ``load`` (the model), and ``write`` (print what follows ``ids``, at most
    ``MOST`` tokens), which stands in a loop."""
    card = student.card
    return _SCRIPT.format(
        imports=imports,
        load=load,
        prefix=repr(next(iter(card.prefixes.values()))),
        longest=card.max_input_tokens,
        write=write.replace("MOST", str(card.max_target_tokens)),
    )
