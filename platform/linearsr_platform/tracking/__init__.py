"""MLflow runs: where a pipeline and its stages write parameters, curves and files."""
