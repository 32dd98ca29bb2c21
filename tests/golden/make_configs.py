"""Writes configs/VERSION.json: tiny/config.json, loaded and saved again by the installed version of transformers.

Run it in this directory, once for each version of transformers; it needs no torch. The files there are from 4.40.2, 4.49.0, 4.57.6 and
5.24.0.
"""
import json
import os
import tempfile

import transformers
from transformers import PretrainedConfig, Qwen2Config, SiglipVisionConfig


class TinyLlavaConfig(PretrainedConfig):
    """Holds the fields of the original's class, and its two parts as the classes of their own."""

    model_type = "tinyllava"

    def __init__(self, text_config=None, vision_config=None, **kwargs):
        base = ("architectures", "torch_dtype", "dtype", "transformers_version", "model_type")
        for field in [field for field in kwargs if field not in base]:
            setattr(self, field, kwargs.pop(field))
        if isinstance(text_config, dict):
            text_config = Qwen2Config.from_dict(text_config)
        if isinstance(vision_config, dict):
            vision_config = SiglipVisionConfig.from_dict(vision_config)
        self.text_config, self.vision_config = text_config, vision_config
        super().__init__(**kwargs)


with open("tiny/config.json") as file:
    config = TinyLlavaConfig.from_dict(json.load(file))
with tempfile.TemporaryDirectory() as directory:
    config.save_pretrained(directory)
    os.makedirs("configs", exist_ok=True)
    os.replace(os.path.join(directory, "config.json"), f"configs/{transformers.__version__}.json")
