"""Distillation: further terms of the loss, and the local teachers that they compare with."""
