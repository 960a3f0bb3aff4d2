"""MLflow model registry: bundles as model versions, and the gate between `challenger` and `champion`."""
