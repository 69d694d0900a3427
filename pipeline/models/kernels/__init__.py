"""Faster ways to compute what transformers and peft compute; each file can be deleted."""
