"""Supervised fine-tuning on tries: data preparation, collator, trainer, command."""
