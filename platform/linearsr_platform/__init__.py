"""The platform: recipes, data, distributed training, tracking and release of LinearSR models."""
