"""Which pipeline stage has which layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tonnage import _errors
from tonnage._native import _matches
from tonnage._placements import Owner
from tonnage._rules.targets import Target

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


@dataclass(frozen=True)
class Pipeline:
    """How a model is cut into stages. See `hf.request`."""

    cut: Cut = "hf"
    virtual: int = 1
    renumber: bool = False
    stage_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ends:
    """What lies before the layers of a model, and after them, by names of modules."""

    first: tuple[str, ...]
    layers: str | None
    last: tuple[str, ...]
    #: What to call the model in errors.
    label: str


class Stages:
    """Which pipeline stage has which tensor."""

    def __init__(self, names: Iterable[str], ends: Ends, size: int, pipeline: Pipeline) -> None:
        self._ends = ends
        self._size = size
        self._pipeline = pipeline
        self._pattern = re.compile(rf"{re.escape(ends.layers or '')}\.(\d{{1,6}})\.")
        numbers = [int(found[1]) for name in names if (found := self._pattern.match(name))]
        if ends.layers is None or not numbers:
            where = "no pp_plan" if ends.layers is None else f"no tensors under {ends.layers}"
            text = (
                f"{ends.label} has {where}, so nothing says which stage has which layer: "
                "give rules={pattern: {'pp': Owner(stage)}}"
            )
            raise _errors.usage(text, "NO_PLAN", needed="pp_plan")
        self._owners = owners(max(numbers) + 1, size, pipeline.cut, pipeline.virtual)
        self._numbers = renumbered(self._owners)

    def placed(self, target: Target) -> Target:
        """The target, on its stage."""
        name = target.name
        found = self._pattern.match(name)
        if found is None:
            return target.placed("pp", Owner(self._beside(name)))
        layer = int(found[1])
        if self._pipeline.renumber:
            local = f"{name[: found.start(1)]}{self._numbers[layer]}{name[found.end(1) :]}"
            target = replace(target, local=local)
        return target.placed("pp", Owner(self._owners[layer]))

    def _beside(self, name: str) -> int:
        for pattern, stage in self._pipeline.stage_of.items():
            if _matches(pattern, name):
                return stage
        for prefixes, stage in ((self._ends.first, 0), (self._ends.last, self._size - 1)):
            if any(name == one or name.startswith(f"{one}.") for one in prefixes):
                return stage
        text = f"{name} is on no pipeline stage: say stage_of={{pattern: stage}}"
        raise _errors.usage(text, "NO_STAGE", tensor=name)
