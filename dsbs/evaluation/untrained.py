"""The floor `untrained`: the student's pretrained model, asked before training."""

from __future__ import annotations

from dsbs.config import StudentRecipe
from dsbs.evaluation.floors import Floor, FloorAnswer, FloorInputs
from dsbs.files import digest
from dsbs.prompting import direct_instruction
from dsbs.records import Example
from dsbs.students.card import StudentCard, architecture_of
from dsbs.students.formats import PAIR_SEPARATOR, new_input_format
from dsbs.students.student import Student
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import device, load_model, weights_fingerprint
from dsbs.tasks import Task


def _why_no_untrained(recipe: StudentRecipe) -> str | None:
    source = recipe.train.init or recipe.student.source
    if source is None:
        return "the student starts from random weights"
    if architecture_of(source) == "encoder":
        return f"{source} is an encoder, which cannot answer before training"
    return None


def _start_model(recipe: StudentRecipe) -> str:
    """The model that the student is trained from."""
    return str(recipe.train.init or recipe.student.source)


def _untrained_identity(inputs: FloorInputs) -> str:
    return digest(
        _start_model(inputs.recipe),
        *weights_fingerprint(_start_model(inputs.recipe)),
        direct_instruction(inputs.recipe, inputs.task),
        inputs.recipe.student.template,
        str(inputs.recipe.student.max_input_tokens),
        str(inputs.recipe.eval.max_label_tokens),
    )


def _predict_untrained(inputs: FloorInputs) -> list[FloorAnswer]:
    """The student's model asked without examples: of a closed set, the label that it gives the
    highest probability; else what it writes.
    """
    recipe = inputs.recipe
    source = _start_model(recipe)
    tokenizer = load_tokenizer(source)
    card = StudentCard(
        name="untrained",
        method="untrained",
        labels="none",
        seed=0,
        task=recipe.task,
        prefixes={"label": ""},
        max_input_tokens=recipe.student.max_input_tokens,
        max_target_tokens=recipe.student.max_target_tokens,
        kind=architecture_of(source),
        template=new_input_format(recipe.student, tokenizer, recipe.train.init).template,
    )
    student = Student.of(load_model(source).to(device()), tokenizer, card)
    instruction = direct_instruction(recipe, inputs.task)
    last = "Answer:" if inputs.task.labels is None else "Label:"
    texts = [f"{instruction}\n\n{_shown(inputs.task, row)}\n{last}" for row in inputs.rows]
    size = recipe.eval.batch_size
    if inputs.task.labels is None:
        written = student.generate(texts, recipe.eval.max_label_tokens, size)
        return [FloorAnswer(output.text) for output in written]
    answers = []
    for shares in student.label_distributions(texts, size):
        distribution = dict(zip(inputs.task.labels, shares, strict=True))
        answers.append(FloorAnswer(max(distribution, key=distribution.__getitem__), distribution))
    return answers


def _shown(task: Task, row: Example) -> str:
    """A row for a model that was not trained: the texts of a pair have their fields' names."""
    text = task.text(row.input)
    if PAIR_SEPARATOR not in text:
        return f"Text: {text}"
    names = [name for name in task.inputs if name in row.input]
    return "\n".join(f"{name.capitalize()}: {row.input[name]}" for name in names)


UNTRAINED = Floor(
    title="untrained student",
    source="the student's model before training, asked without examples",
    learns=False,
    asks_student=True,
    missing=_why_no_untrained,
    identity=_untrained_identity,
    predict=_predict_untrained,
)
