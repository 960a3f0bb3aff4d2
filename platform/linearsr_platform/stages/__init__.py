"""The stages of a run: each turns its settings and the results it names into artifacts under the run's storage."""
