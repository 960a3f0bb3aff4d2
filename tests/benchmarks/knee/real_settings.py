"""The runs of the benchmark on real curves: what each may see, and for how long."""

from real_training import PLAIN, Setting

OVERFIT = Setting(
    name="overfit",
    crops=32,
    augmentation=PLAIN,
    tag_dropout=0.0,
    train={"max_steps": 5000, "validate_every": 50, "crop_px": 48, "weight_decay": 0.0},
)
"""224 fixed crops, 32 of each training photograph, always the same way round and degraded once: half a million pixels in all."""

QUICKSTART = Setting(name="quickstart", train={"max_steps": 4500})
"""All that the quickstart trains on, as it does, for more than twice its steps."""

SETTINGS = {setting.name: setting for setting in (OVERFIT, QUICKSTART)}
RUNS = (("overfit", 0), ("overfit", 1), ("overfit", 2), ("quickstart", 0))
