"""From photographs to checked WebDataset shards, and from shards to batches of crops."""
