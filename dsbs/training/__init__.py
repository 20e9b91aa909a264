"""Training: methods as records, exact losses, and a resumable loop on Seq2SeqTrainer."""
