"""Training: methods, exact losses, and a loop on Seq2SeqTrainer that resumes after any stop."""
