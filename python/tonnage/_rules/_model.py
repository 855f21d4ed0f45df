"""What transformers knows of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tonnage import _errors
from tonnage._rules import hf, trace


def knows(model_type: str) -> bool:
    """Whether transformers has this kind of model itself; code of a repository is never run."""
    return model_type in CONFIG_MAPPING


def configured(found: Mapping[str, Any]) -> Any:
    """The configuration that a `config.json` says. Raises `UsageError` for what transformers
    refuses.
    """
    try:
        return CONFIG_MAPPING[found["model_type"]].from_dict(dict(found))
    except Exception as error:
        # Its checks are of many classes, and this file came with the checkpoint.
        text = f"transformers refuses the configuration: {error}"
        raise _errors.usage(text, "CONFIG") from error


def build(config: Any, tensors: int) -> Any:
    """The model of a configuration, on the meta device: shapes, and no memory.

    Raises `UsageError` for what transformers refuses, and for more layers than a checkpoint of so
    many tensors can have: modules take memory, and a configuration may say any number.
    """
    layers = _layers(config.to_dict())
    if layers > max(tensors, 64) * 16:
        text = f"the configuration says {layers} layers, and the checkpoint has {tensors} tensors"
        raise _errors.usage(text, "CONFIG", found=str(layers))
    names = [one for one in getattr(config, "architectures", None) or () if isinstance(one, str)]
    chosen = next((getattr(transformers, name, None) for name in names), None)
    try:
        with torch.device("meta"):
            if chosen is not None and hasattr(chosen, "_from_config"):
                return chosen._from_config(config)
            try:
                return transformers.AutoModelForCausalLM.from_config(config)
            except ValueError:
                return transformers.AutoModel.from_config(config)
    except Exception as error:
        # Anything that a module's constructor meets in numbers that do not fit each other.
        text = f"transformers cannot make a model of the configuration: {error}"
        raise _errors.usage(text, "CONFIG") from error


def _layers(found: Any) -> int:
    """The largest number of layers that a configuration says, at any depth."""
    largest = 0
    for key, value in found.items():
        if isinstance(value, Mapping):
            largest = max(largest, _layers(value))
        elif isinstance(value, int) and ("layers" in str(key) or str(key) in ("n_layer", "depth")):
            largest = max(largest, value)
    return largest


def described(catalog: Mapping[str, trace.Ref], model: Any) -> hf.Model:
    """A model of transformers, and how a checkpoint becomes its tensors."""
    made = trace.conversion(catalog, model)
    exprs, shapes = dict(made.exprs), dict(made.shapes)
    state = model.state_dict(keep_vars=True)
    for name, same in _tied(model):
        for copy, of in ((name, same), (same, name)):
            if copy not in exprs and of in exprs and copy in state:
                exprs[copy], shapes[copy] = exprs[of], shapes[of]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in state if name in parameters and name not in exprs]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        text = f"the checkpoint has nothing that makes {missing[0]}{more} of the model"
        raise _errors.usage(text, "MISSING", tensor=missing[0])
    config = model.config.get_text_config()
    first, layers, last = _pipeline(model)
    return hf.Model(
        # In the order of the model, which is about that of use.
        exprs={name: exprs[name] for name in state if name in exprs},
        shapes=shapes,
        buffers=frozenset(name for name in exprs if name not in parameters),
        tp=dict(getattr(model, "tp_plan", None) or {}),
        ep=dict(getattr(model, "ep_plan", None) or {}),
        first=first,
        layers=layers,
        last=last,
        heads=_number(config, "num_attention_heads"),
        kv_heads=_number(config, "num_key_value_heads") or _number(config, "num_attention_heads"),
        label=type(model).__name__,
        unexpected=tuple(made.unexpected),
        ignored=tuple(_ignored(model, made.unexpected)),
    )


def _number(config: Any, name: str) -> int | None:
    found = getattr(config, name, None)
    return found if isinstance(found, int) else None


def _tied(model: Any) -> list[tuple[str, str]]:
    """Names of one parameter, in pairs."""
    return list((getattr(model, "all_tied_weights_keys", None) or {}).items())


def _pipeline(model: Any) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """What the first stage has, the list of layers, and what the last stage has.

    The base model's plan is in the order of use, around its layers; what the model has around the
    base model, such as the head, comes after it.
    """
    base = list(getattr(model.config, "base_model_pp_plan", None) or {})
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    of_layers = [one for one in base if one in ("layers", "h", "blocks", "block")]
    if not of_layers:
        return (), None, ()
    at = base.index(of_layers[0])
    own = [one for one in getattr(type(model), "_pp_plan", None) or {} if one not in base]
    last = [f"{prefix}{one}" for one in base[at + 1 :]] + own
    return tuple(f"{prefix}{one}" for one in base[:at]), f"{prefix}{base[at]}", tuple(last)


def _ignored(model: Any, unexpected: list[str]) -> list[str]:
    """Tensors that the model's own code says to pass over."""
    patterns = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    return [name for name in unexpected if any(one.search(name) for one in patterns)]
