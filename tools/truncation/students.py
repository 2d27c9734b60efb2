"""Students made from another model.

python tools/truncation/students.py thinned MODEL FOLDER      every third layer
python tools/truncation/students.py untrained MODEL FOLDER    the same shape, random weights
"""

import sys
from typing import Any

LAYERS_PER_KEPT = 3


def write_thinned(teacher: str, folder: str) -> None:
    """Copy a model without two of three layers; the first and the last stay."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = model.model.layers
    num_kept = len(layers) // LAYERS_PER_KEPT
    kept = [round(place * (len(layers) - 1) / (num_kept - 1)) for place in range(num_kept)]
    model.model.layers = torch.nn.ModuleList(layers[index] for index in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = num_kept
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def write_untrained(model: str, folder: str) -> None:
    """Write a model of the same shape whose weights are drawn anew, from seed 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    drawn: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    drawn.to(torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def main() -> None:
    match sys.argv[1:]:
        case ["thinned", model, folder]:
            write_thinned(model, folder)
        case ["untrained", model, folder]:
            write_untrained(model, folder)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
