"""Name nodes after the module they come from, so that a graph viewer shows the model's own structure."""

from __future__ import annotations

import ast

import onnx_ir as ir

__all__ = ["NameNodes"]


class NameNodes(ir.passes.InPlacePass):
    """``model.language_model.layers.3.mlp`` + ``MoEExperts`` → ``layers.3.mlp/MoEExperts``.

    1. The innermost module of the traced scope is the prefix; the common stem of all modules is dropped.
    2. A name used before gets a number.
    3. The scope metadata is removed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        counts: dict[str, int] = {}
        for node in model.graph:
            scopes = ast.literal_eval(node.metadata_props.pop("scope", "[]"))
            modules = [scope for scope in scopes[:-1] if scope.startswith("source.")]
            module = modules[-1].removeprefix("source.model.").removeprefix("source.") if modules else ""
            module = module.removeprefix("language_model.").removeprefix("visual.")
            name = f"{module}/{node.op_type}" if module else node.op_type
            counts[name] = counts.get(name, 0) + 1
            node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        return ir.passes.PassResult(model, bool(counts))
