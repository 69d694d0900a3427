"""SFT and reward models: everything that subclasses transformers.Trainer."""
