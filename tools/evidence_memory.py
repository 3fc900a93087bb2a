"""The block of optimizer memory: counted on models without weights, so that it needs no file of docs/results."""

import re
from functools import cache

import torch
from evidence_results import Results, block, markdown

from coupled_adam import CoupledAdam, describe, param_groups

#: The numbers in their published config.json that count.
SMOLLM2_135M = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_3_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
STATE = re.compile(
    r"state: (?P<coupled>[\d.]+) (?P<unit>\wB); uncoupled it would be (?P<adamw>[\d.]+) (?P<unit_adamw>\wB)"
)
GIGABYTES = {"MB": 1e-3, "GB": 1.0}


@block("memory")
def memory(_: Results) -> str:
    return _memory()


@cache
def _memory() -> str:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

    configs: dict[str, PretrainedConfig] = {
        "GPT-2 (124M, tied)": GPT2Config(),
        "SmolLM2-135M (tied)": LlamaConfig(**SMOLLM2_135M),
        "Llama-3-8B (untied)": LlamaConfig(**LLAMA_3_8B),
    }
    rows = []
    for name, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        share = model.get_output_embeddings().weight.numel() / sum(p.numel() for p in model.parameters())
        groups = param_groups(model)
        eighth = [{**groups[0], "exp_avg_dtype": "8bit"}, *groups[1:]]
        sizes = [STATE.search(describe(CoupledAdam(each))) for each in (groups, eighth)]
        (plain, adamw), (small, _) = (
            (float(coupled) * GIGABYTES[unit], float(uncoupled) * GIGABYTES[its])
            for coupled, unit, uncoupled, its in (size.groups() for size in sizes if size)
        )
        ours = [f"{size:.2f} GB ({size / adamw - 1:.0%})" for size in (plain, small)]
        rows.append([name, f"{share:.1%}", f"{adamw:.2f} GB", *ours])
    headings = ["model", "share of the output embedding", "AdamW", "Coupled Adam"]
    return markdown([*headings, "with its first moment in 8 bits"], rows)
