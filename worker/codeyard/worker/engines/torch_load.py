"""A transformers model from a directory: which format, which type, quantised or not.

Called by: torch_batch, in the child process. Raises ValueError for what this engine cannot do, with the way
out; anything else is transformers' own.
"""

import importlib.util
import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

FORMATS = ("auto", "safetensors", "dummy")
BITS = {"8bit": 8, "4bit": 4, "bitsandbytes": 4}  # the last is what vLLM calls it
LIBRARIES = ("bitsandbytes", "accelerate")


def load_model(directory: str, *, device: torch.device, dtype: str, load_format: str, quantization: str | None) -> Any:
    """On its device, ready to run. `dtype` "auto" is float32 on a CPU: as fast there, and it repeats exactly."""
    if load_format not in FORMATS:
        raise ValueError(f"load format {load_format!r}: the torch engine reads {', '.join(FORMATS)}; vLLM has others")
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    if load_format == "dummy":
        if quantization is not None:
            raise ValueError("dummy weights cannot be quantised")
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        given = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        return AutoModelForCausalLM.from_config(config, **given).to(device).eval()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if load_format == "safetensors":
        options["use_safetensors"] = True
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(directory, **options).to(device).eval()
    options["quantization_config"] = _quantized(quantization, device, dtype)
    return AutoModelForCausalLM.from_pretrained(directory, device_map={"": device}, **options).eval()


def _quantized(name: str, device: torch.device, dtype: str) -> Any:
    if name not in BITS:
        raise ValueError(f"quantization {name!r}: the torch engine takes {', '.join(BITS)}; vLLM takes others")
    missing = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if missing:
        raise ValueError(
            f"quantization {name} needs {' and '.join(missing)}: pip install 'codeyard[quantization]', "
            "or leave CODEYARD_ENGINE_QUANTIZATION out"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each product that it rounds
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        able = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise ValueError(f"quantization {name}: bitsandbytes has nothing for {device.type}, only for {able}")
    if BITS[name] == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
