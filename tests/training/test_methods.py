from __future__ import annotations

from dsbs.config import TrainSection
from dsbs.training.grid import grid
from dsbs.training.methods import method_of


def test_the_grid_has_gold_finetuning_teacher_distillation_and_step_by_step_on_the_labels_asked_for() -> (
    None
):
    cells = grid(TrainSection(labels=("gold", "teacher"), seeds=(0, 1)))
    assert [cell.name for cell in cells if cell.seed == 0] == [
        "step-by-step-gold-s0",
        "step-by-step-teacher-s0",
        "finetune-gold-s0",
        "distill-teacher-s0",
    ]
    assert len(cells) == 8


def test_single_task_methods_have_no_prefix_and_step_by_step_has_the_published_ones() -> None:
    train = TrainSection(rationale_weight=0.3)
    assert [view.prefix for view in method_of("step-by-step").views(train)] == [
        "predict: ",
        "explain: ",
    ]
    assert [view.weight for view in method_of("step-by-step").views(train)] == [1.0, 0.3]
    for name in ("finetune", "distill"):
        assert [(view.target, view.prefix) for view in method_of(name).views(train)] == [
            ("label", "")
        ]
