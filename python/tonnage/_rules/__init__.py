"""Rules from where people have them already, as requests to the planner.

`request` is the door: a mesh with rules, or tensors that say themselves where they are. The modules
beside it each know one place where rules come from: `hf` (a model's parallel plans), `trace`
(weight converters), `dtensor` (state dicts), `vllm`, `megatron`, `prefetch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tonnage import _errors
from tonnage._placements import Mesh, Placement

#: What rules say of tensors: by pattern, a placement, or one for each axis.
Rules = Mapping[str, Placement | Mapping[str, Placement]]


def request(
    catalog: Mapping[str, Any], what: Any, rules: Rules | str | None = None, **options: Any
) -> dict[str, Any]:
    """The request that `Checkpoint.plan` sends.

    Args:
        catalog: the checkpoint: names to objects with `shape` and `dtype`.
        what: a mesh; a module or a state dict whose tensors are `DTensor`s; or a list of the state
            dicts of all ranks, of tensors with the attributes of `CheckpointableTensor`.
        rules: with a mesh: `"auto"`, the default, or a dict as `patterns` takes it.
        options: those of `hf.request`, `dtensor.request` and `dtensor.request_of_ranks`.

    Returns:
        A request; of a dict of rules, `{"mesh", "alt", "rules", "unread"?}`, which the planner
        applies to all tensors itself.
    """
    if isinstance(what, Mesh):
        if rules is None or rules == "auto":
            from tonnage._rules import hf

            return hf.request(catalog, what, **options)
        if isinstance(rules, str):
            text = f"rules must be 'auto' or a dict of patterns and placements, not {rules!r}"
            raise _errors.usage(text, "RULES", found=rules)
        return {**what.to_json(), "rules": patterns(rules), **options}
    if rules is not None:
        raise _errors.usage("rules go with a mesh: these tensors say themselves where they are")
    from tonnage._rules import dtensor

    if isinstance(what, Sequence):
        return dtensor.request_of_ranks(what, catalog, **options)
    if hasattr(what, "base_model_prefix") and "exprs" not in options:
        # A model of transformers: what the checkpoint has under other names, or in other pieces.
        from tonnage._rules import _model, targets

        known = _model.described(catalog, what)
        state = what.state_dict(keep_vars=True)
        ignored = [targets.literal(name) for name in known.ignored] or "error"
        options = {"exprs": known.exprs, "unread": ignored, **options}
        what = {name: tensor for name, tensor in state.items() if name in known.exprs}
    return dtensor.request(what, catalog, **options)


def patterns(rules: Rules) -> dict[str, Any]:
    """Rules as the planner takes them: in order, the first pattern that matches a name holds.

    A placement without an axis is for `tp` (an `Owner` for `pp`), or for the only axis.
    """
    made: dict[str, Any] = {}
    for pattern, rule in rules.items():
        whole: object = rule
        if isinstance(whole, Placement):
            made[str(pattern)] = whole.to_json()
        elif isinstance(whole, Mapping):
            made[str(pattern)] = {str(axis): one.to_json() for axis, one in whole.items()}
        else:
            text = f"the rule for {pattern!r} must be a placement or a dict of axes, not {rule!r}"
            raise TypeError(text)
    return made
