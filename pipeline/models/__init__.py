"""Networks and text <-> tokens: loading, tiny from-scratch models, the shared model, generation."""
