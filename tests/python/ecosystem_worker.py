"""One process of the ecosystem test: saves or loads tiny models through the libraries people use.

    python ecosystem_worker.py (reference|tonnage) save FOLDER
    python ecosystem_worker.py (reference|tonnage) load FOLDER…

With `tonnage`, Tonnage is put in place of `safetensors` before any library is imported. `save`
makes every model from a configuration and a seed, saves it to FOLDER/<case>, and prints what was
in it; `load` reads every case of every FOLDER and prints what came out. Both print one JSON object,
{folder: {case: {name: [dtype, shape, digest]}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")

IN_PLACE = sys.argv[1] == "tonnage"
if IN_PLACE:
    import tonnage

    tonnage.as_safetensors()

import accelerate
import diffusers
import huggingface_hub
import peft
import torch
import transformers

#: Small enough that a model of a few dozen kilobytes becomes several file shards.
SHARDS = "40KB"
Digest = dict[str, list[Any]]


@dataclass(frozen=True)
class Case:
    save: Callable[[Path], Digest]
    load: Callable[[Path], Digest]


def digest(state: dict[str, torch.Tensor]) -> Digest:
    """Dtype, shape and bytes of every tensor; equal digests are equal tensors."""
    found = {}
    for name, tensor in state.items():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()]
    return found


def llama(*, tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def bert() -> Any:
    torch.manual_seed(8)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.BertModel(config)


def unet() -> Any:
    torch.manual_seed(9)
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def plain() -> torch.nn.Module:
    torch.manual_seed(10)
    layers = [torch.nn.Linear(32, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 32)]
    return torch.nn.Sequential(*layers)


def lora() -> Any:
    torch.manual_seed(11)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(tied=False), config)


def pretrained(make: Callable[[], Any], kind: type, **options: Any) -> Case:
    """A model with the usual pair, save_pretrained and from_pretrained."""

    def save(home: Path) -> Digest:
        model = make()
        model.save_pretrained(home, **options)
        return digest(model.state_dict())

    def load(home: Path) -> Digest:
        return digest(kind.from_pretrained(home).state_dict())

    return Case(save, load)


def save_peft(home: Path) -> Digest:
    model = lora()
    model.save_pretrained(home)
    return digest(model.state_dict())


def load_peft(home: Path) -> Digest:
    return digest(peft.PeftModel.from_pretrained(llama(tied=False), home).state_dict())


def save_accelerate(home: Path) -> Digest:
    model = plain()
    accelerate.Accelerator(cpu=True).save_model(model, home, max_shard_size="12KB")
    return digest(model.state_dict())


def load_accelerate(home: Path) -> Digest:
    model = torch.nn.Sequential(*plain()).apply(zero)
    accelerate.load_checkpoint_in_model(model, home)
    return digest(model.state_dict())


def load_dispatched(home: Path) -> Digest:
    with accelerate.init_empty_weights():
        model = plain()
    model = accelerate.load_checkpoint_and_dispatch(model, home, device_map={"": "cpu"})
    return digest(model.state_dict())


def zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.zeros_(parameter)


def save_hub(home: Path) -> Digest:
    state = plain().state_dict()
    before = digest(state)
    state["again"] = state["0.weight"]  # shared: the Hub's helper keeps one of the two names
    home.mkdir(parents=True)
    huggingface_hub.save_torch_state_dict(state, home, max_shard_size="12KB")
    return before


def load_hub(home: Path) -> Digest:
    model = plain().apply(zero)
    huggingface_hub.load_torch_model(model, home)
    return digest(model.state_dict())


def save_torch(home: Path) -> Digest:
    from safetensors.torch import save_file

    home.mkdir(parents=True)
    state = {**plain().state_dict(), "half": torch.arange(7, dtype=torch.bfloat16)}
    save_file(state, home / "x.safetensors")
    return digest(state)


def load_torch(home: Path) -> Digest:
    return digest(torch.load(home / "x.safetensors"))


CASES: dict[str, Case] = {
    "transformers-bert-single": pretrained(bert, transformers.BertModel),
    "transformers-bert-sharded": pretrained(bert, transformers.BertModel, max_shard_size=SHARDS),
    "transformers-llama-tied-single": pretrained(
        lambda: llama(tied=True), transformers.LlamaForCausalLM
    ),
    "transformers-llama-bf16-sharded": pretrained(
        lambda: llama(tied=False, dtype=torch.bfloat16),
        transformers.LlamaForCausalLM,
        max_shard_size="15KB",
    ),
    "diffusers-unet-single": pretrained(unet, diffusers.UNet2DModel),
    "diffusers-unet-sharded": pretrained(unet, diffusers.UNet2DModel, max_shard_size="300KB"),
    "peft-lora": Case(save_peft, load_peft),
    "accelerate-model-sharded": Case(save_accelerate, load_accelerate),
    "accelerate-dispatch-sharded": Case(save_accelerate, load_dispatched),
    "hub-state-dict-sharded": Case(save_hub, load_hub),
    "torch-load": Case(save_torch, load_torch),
}


def main(action: str, folders: list[str]) -> dict[str, dict[str, Digest]]:
    import safetensors.torch

    home = safetensors.torch.save_file.__module__.partition(".")[0]
    if home != ("tonnage" if IN_PLACE else "safetensors"):
        raise SystemExit(f"{sys.argv[1]} was asked for, and `safetensors` is {home}")
    return {
        folder: {name: getattr(case, action)(Path(folder) / name) for name, case in CASES.items()}
        for folder in folders
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[2], sys.argv[3:])))
