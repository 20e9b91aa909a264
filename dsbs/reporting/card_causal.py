"""The lines of a student's card that call a decoder-only student without dsbs."""

from __future__ import annotations

import json

from dsbs.students import StudentCard
from dsbs.students.formats import DATE


def causal_call(name: str, own: StudentCard, text: str, max_label_tokens: int) -> list[str]:
    """The lines of a plain call of the student in the folder ``name``; they leave out the cut after ``max_input_tokens``."""
    folder, content = json.dumps(name), json.dumps(own.prefixes["label"] + text, ensure_ascii=False)
    if own.template == "chat":
        prompt = [
            f'turn = {{"role": "user", "content": {content}}}',
            "inputs = tokenizer.apply_chat_template(",
            "    [turn], add_generation_prompt=True, enable_thinking=False,",
            # the one that it was trained with, for templates that write the day's date
            f'    date_string={json.dumps(DATE)}, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        prompt = [f'inputs = tokenizer({content} + "\\n", return_tensors="pt")']
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})  # this folder",
        f"model = AutoModelForCausalLM.from_pretrained({folder})",
        *prompt,
        f"ids = model.generate(**inputs, max_new_tokens={max_label_tokens}, num_beams=1, do_sample=False)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
