"""The recipe: typed settings of a run, read from YAML, merged, checked all at once, and hashed. Imports no torch."""
