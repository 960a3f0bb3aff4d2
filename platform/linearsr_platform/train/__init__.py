"""The one training loop, its DeepSpeed engine, average of weights, validation and checkpoints. No Ray here."""
