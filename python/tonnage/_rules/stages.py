"""Which pipeline stage has which layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tonnage import _errors

#: How layers are cut: by a policy, by counts per stage, or by lists of layers per stage.
Cut = str | Sequence[int] | Sequence[Sequence[int]]


def counts(layers: int, parts: int, policy: str = "hf") -> list[int]:
    """How many layers each of `parts` consecutive parts has.

    `"hf"`: the first parts have one more where they do not come out even, as in transformers.
    `"vllm"`: the parts before the last have, counted from the last: the last stage also has the
    head to compute.
    """
    each, rest = divmod(layers, parts)
    made = [each] * parts
    if policy == "hf":
        extra = range(rest)
    elif policy == "vllm":
        extra = range(parts - 1 - rest, parts - 1)
    else:
        text = f"stages must be 'hf', 'vllm', or say what each stage has, not {policy!r}"
        raise _errors.usage(text, "STAGES")
    for at in extra:
        made[at] += 1
    return made


def owners(layers: int, stages: int, cut: Cut = "hf", virtual: int = 1) -> list[int]:
    """The stage of every layer.

    Args:
        layers: how many there are.
        stages: how many stages the mesh has.
        cut: `"hf"`, `"vllm"`; how many layers each stage has (with virtual stages, each chunk, in
            the order of the model); or a list of layers for each stage.
        virtual: chunks of consecutive layers that each stage has. Chunk `i` is on stage
            `i % stages`, so that a stage runs several times per step.

    Raises `UsageError` where a layer has no stage, or two.
    """
    if virtual < 1:
        raise _errors.usage(f"virtual must be 1 or more, not {virtual}", "STAGES")
    parts = stages * virtual
    if isinstance(cut, str):
        sizes = counts(layers, parts, cut)
    elif all(isinstance(one, int) for one in cut):
        sizes = [int(one) for one in cut if isinstance(one, int)]
    else:
        return _listed(layers, stages, [one for one in cut if not isinstance(one, int)])
    if len(sizes) != parts or sum(sizes) != layers or min(sizes) < 0:
        text = f"{sizes} does not cut {layers} layers into {parts} parts"
        raise _errors.usage(text, "STAGES", found=str(sizes), needed=str(parts))
    return [at % stages for at, size in enumerate(sizes) for _ in range(size)]


def _listed(layers: int, stages: int, cut: Sequence[Sequence[int]]) -> list[int]:
    if len(cut) != stages:
        raise _errors.usage(f"{len(cut)} lists of layers for {stages} stages", "STAGES")
    made: dict[int, int] = {}
    for stage, owned in enumerate(cut):
        for layer in owned:
            if not 0 <= layer < layers or layer in made:
                why = "has two stages" if layer in made else f"is not one of the {layers}"
                raise _errors.usage(f"layer {layer} {why}", "STAGES", found=str(layer))
            made[layer] = stage
    if len(made) != layers:
        missing = next(layer for layer in range(layers) if layer not in made)
        raise _errors.usage(f"layer {missing} has no stage", "STAGES", found=str(missing))
    return [made[layer] for layer in range(layers)]


def renumbered(owner: Sequence[int]) -> Mapping[int, int]:
    """For each layer, its number among the layers of its stage."""
    seen: dict[int, int] = {}
    made = {}
    for layer, stage in enumerate(owner):
        made[layer] = seen.get(stage, 0)
        seen[stage] = made[layer] + 1
    return made
