"""Golden outputs of DINOv2 with and without registers, made with transformers."""

from pathlib import Path

import numpy as np

from tests.golden.vit import hf_arrays

# The first is what positions are made for.
SIZES = ((16, 16), (12, 20))
CASES = {"dinov2_tiny": "Dinov2", "dinov2_registers": "Dinov2WithRegisters"}


def make(folder: Path) -> None:
    """Writes a file for each case; the one with registers has gated MLPs too."""
    import transformers

    for name, kind in CASES.items():
        more = {"num_register_tokens": 3, "use_swiglu_ffn": True}
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            mlp_ratio=2,
            image_size=SIZES[0][0],
            patch_size=4,
            num_labels=5,
            layerscale_value=0.5,
            **(more if "Registers" in kind else {}),
        )
        model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
        np.savez_compressed(folder / f"{name}.npz", **hf_arrays(model, SIZES))
