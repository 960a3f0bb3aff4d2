"""A registered bundle as an MLflow model. MLflow copies this file into each model version and runs it to load one.

It needs the `linearsr` package and MLflow, and loads safetensors and JSON only.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from linearsr.bundle import load_bundle
from linearsr.upscaler import Upscaler


class BundleModel(PythonModel):
    """Upsamples batches of images."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the experts of the bundle onto the device that `model_config` names.

        Raises:
            ValueError: if it is not the bundle that was registered.
        """
        bundle = load_bundle(Path(context.artifacts["bundle"]))
        expected = context.model_config["bundle_digest"]
        if bundle.digest != expected:
            raise ValueError(f"{bundle.folder}: got a bundle with SHA-256 {bundle.digest}; expected the registered one, {expected}")
        self.upscaler = Upscaler(bundle, device=context.model_config["device"])

    # Plain `np.ndarray`: MLflow reads the annotation of `model_input` as a schema, and this one leaves that to the signature.
    def predict(self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Upsample (B, 3, h, w) float32 in [0, 1] to (B, 3, s h, s w) float32 in [0, 1].

        Args:
            context: not used.
            model_input: numpy array of LR images.
            params: `seed`, `steps` (0: the bundle's own number), `estimate` (`routed` or `one_step`), `tags`.

        Raises:
            ValueError: if `estimate` is neither.
        """
        chosen = params or {}
        estimate = chosen.get("estimate", "routed")
        if estimate not in ("routed", "one_step"):
            raise ValueError(f"params.estimate: got {estimate!r}; expected 'routed' or 'one_step'")
        images = self.upscaler.upscale_tensor(
            torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.float32)),
            tags=tuple(str(tag) for tag in chosen.get("tags", ())),
            seed=int(chosen.get("seed", 0)),
            steps=int(chosen.get("steps", 0)) or None,
            estimate=estimate,
        )
        return np.asarray(images.float().numpy())


set_model(BundleModel())
