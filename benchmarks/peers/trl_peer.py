"""The GKD loss of trl on logits that anybody can compute again, for the tests of ``response``.

    python -m venv trl && trl/bin/pip install trl datasets
    trl/bin/python benchmarks/peers/trl_peer.py

Printed is a JSON object: trl's version, and its mean loss per token by β and temperature. β = 0 is
KL(teacher ‖ student) and β = 1 the reverse. trl does not multiply by the squared temperature.
tests/training/distillation/test_response_term.py has the values.
"""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import trl
from trl.experimental.gkd import GKDTrainer

ROWS, TOKENS, VOCABULARY = 2, 3, 7
positions = torch.arange(ROWS * TOKENS * VOCABULARY, dtype=torch.float64)
student = (3 * torch.sin(positions)).view(ROWS, TOKENS, VOCABULARY)
teacher = (3 * torch.cos(1.7 * positions)).view(ROWS, TOKENS, VOCABULARY)
labels = torch.zeros(ROWS, TOKENS, dtype=torch.long)
labels[1, 2] = -100  # padding

losses = {}
for beta in (0.0, 0.3, 0.5, 1.0):
    for temperature in (0.5, 1.0, 4.0):
        loss = GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=labels, beta=beta, temperature=temperature
        )
        losses[f"{beta} {temperature}"] = float(loss)
print(json.dumps({"trl": trl.__version__, "losses": losses}, indent=2))
