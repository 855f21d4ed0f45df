"""Where what is known of a model comes from: the model, or its `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tonnage import _errors
from tonnage._rules import _known, hf

#: A configuration is some kilobytes; this bounds what a stray file can make us read.
_LIMIT = 16 << 20


def described(catalog: Mapping[str, Any], config: Any, model: Any) -> hf.Model:
    """What is known of a model, from whatever the caller gave or lies beside the checkpoint."""
    if model is not None:
        if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
            text = (
                f"{type(model).__name__} is no model of transformers, so it has no plan: "
                "give rules={pattern: placement}, or its state dict of DTensors"
            )
            raise _errors.usage(text, "NO_PLAN")
        from tonnage._rules import _model

        return _model.described(catalog, model)
    found = as_dict(config if config is not None else beside(catalog))
    kind = found.get("model_type")
    quantised = "quantization_config" in found
    # What transformers makes of quantised tensors takes arithmetic; our table leaves them stored.
    if not quantised and isinstance(kind, str) and find_spec("transformers") is not None:
        from tonnage._rules import _model

        if _model.knows(kind):
            chosen = config if hasattr(config, "get_text_config") else _model.configured(found)
            return _model.described(catalog, _model.build(chosen, len(catalog)))
    return _known.described(catalog, found)


def beside(catalog: Any) -> str:
    """The path of the `config.json` that lies beside a checkpoint."""
    labels = [
        getattr(catalog, "label", None),
        *(one.label for one in getattr(catalog, "files", ())),
    ]
    for label in labels:
        if not isinstance(label, str):
            continue
        for folder in (label, os.path.dirname(label)):
            path = os.path.join(folder, "config.json")
            if os.path.isfile(path):
                return path
    text = (
        "rules='auto' needs to know the model, and there is no config.json beside the checkpoint: "
        "give config=, model=, or rules={pattern: placement}"
    )
    raise _errors.usage(text, "NO_CONFIG")


def as_dict(config: Any) -> dict[str, Any]:
    """The contents of a configuration, however it is given."""
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    path = os.fspath(config)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    with open(path, "rb") as file:
        text = file.read(_LIMIT + 1)
    try:
        if len(text) > _LIMIT:
            raise ValueError(f"it is larger than {_LIMIT} bytes")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise TypeError("it is not an object")
    except (ValueError, TypeError, RecursionError) as error:
        text_of = f"{path} is no configuration: {error}"
        raise _errors.make("Format", text_of, code="CONFIG", file=path) from None
    return found
