"""Writes tiny_folders/: a checkpoint in the family's three-folder layout, as its training recipe saves it.

Element i of a tensor is ((31 i + length of its published name) mod 97) / 97 - 0.5, rounded to bfloat16, so that a test
can recompute it. Needs torch; run it in this directory.
"""
import json
import os

import torch

D, V, INNER = 16, 8, 512
config = {
    "model_type": "tinyllava", "connector_type": "groupresampler", "group": 2, "num_queries": 4,
    "num_resampler_layers": 1, "hidden_size": D, "vision_hidden_size": V, "tokenizer_model_max_length": 64,
    "text_config": {
        "model_type": "qwen2", "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": V, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    },
}


def linear(name, rows, columns):
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def norm(name, width):
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


text = {"model.embed_tokens.weight": [64, D], "model.norm.weight": [D]}
layer = "model.layers.0."
text |= linear(layer + "self_attn.q_proj", D, D) | linear(layer + "self_attn.k_proj", D // 2, D)
text |= linear(layer + "self_attn.v_proj", D // 2, D) | {layer + "self_attn.o_proj.weight": [D, D]}
text |= {layer + f"mlp.{n}_proj.weight": [24, D] for n in ("gate", "up")} | {layer + "mlp.down_proj.weight": [D, 24]}
text |= {layer + f"{n}_layernorm.weight": [D] for n in ("input", "post_attention")}

vision = {"vision_model.embeddings.patch_embedding.weight": [V, 3, 4, 4],
          "vision_model.embeddings.patch_embedding.bias": [V],
          "vision_model.embeddings.position_embedding.weight": [4, V]}
for i in range(2):
    layer = f"vision_model.encoder.layers.{i}."
    for n in ("k", "v", "q", "out"):
        vision |= linear(layer + f"self_attn.{n}_proj", V, V)
    vision |= norm(layer + "layer_norm1", V) | norm(layer + "layer_norm2", V)
    vision |= linear(layer + "mlp.fc1", 12, V) | linear(layer + "mlp.fc2", V, 12)

connector = {"_connector.latents": [2, D]} | linear("_connector.linear", D, V) | norm("_connector.norm", D)
layer = "_connector.layers.0."
connector |= norm(layer + "0.norm_media", D) | norm(layer + "0.norm_latents", D) | norm(layer + "1.0", D)
connector |= {layer + "0.to_q.weight": [INNER, D], layer + "0.to_kv.weight": [2 * INNER, D],
              layer + "0.to_out.weight": [D, INNER], layer + "1.1.weight": [4 * D, D], layer + "1.3.weight": [D, 4 * D]}

for folder, prefix, shapes in [("language_model", "language_model.", text),
                               ("vision_tower", "vision_tower._vision_tower.", vision),
                               ("connector", "connector.", connector)]:
    state = {}
    for key, shape in shapes.items():
        count = torch.Size(shape).numel()
        values = [((31 * i + len(prefix + key)) % 97) / 97 - 0.5 for i in range(count)]
        state[key] = torch.tensor(values, dtype=torch.float32).reshape(shape).to(torch.bfloat16)
    os.makedirs(f"tiny_folders/{folder}", exist_ok=True)
    torch.save(state, f"tiny_folders/{folder}/pytorch_model.bin")
with open("tiny_folders/config.json", "w") as file:
    json.dump(config, file, indent=2)
