"""LinearSR: photorealistic super-resolution with a linear-attention diffusion transformer.

This package is the method and needs torch, numpy, pillow and safetensors only. It imports nothing here, so that
`linearsr.config` stays cheap enough for a command that only validates a recipe.
Source: LinearSR, ICLR 2026, arXiv 2510.08771.
"""
