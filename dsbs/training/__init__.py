"""Training: baselines as data, exact losses, a loop on Seq2SeqTrainer that can be killed at any moment."""
