"""How an operator is declared: its attributes, its tensors, and the ONNX function that defines it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deepstitch.errors import DeepstitchError, did_you_mean, list_names

if TYPE_CHECKING:
    import onnx

__all__ = ["DOMAIN", "DTYPES", "Attribute", "Kind", "OpSchema", "PluginError", "TensorSpec"]

DOMAIN = "deepstitch.plugins"  # of the ONNX operators, and the namespace of the TensorRT plugins
DTYPES = ("float32", "float16", "int8", "int32")  # in the order of the C++ enum
Kind = Literal["int", "float", "string", "ints"]
_TYPES: dict[str, tuple[type[Any], ...]] = {
    "int": (int,),
    "float": (float, int),
    "string": (str,),
    "ints": (list, tuple),
}


class PluginError(DeepstitchError):
    """An operator refuses its attributes or inputs, or its library cannot be built or opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """One attribute of an operator.

    Attributes:
        name: as in the ONNX node.
        kind: of its value.
        required: there is no default.
        default: what holds where the node does not say.
        choices: the values allowed, where they are few.
        doc: one line for the table of a README.
    """

    name: str
    kind: Kind
    required: bool = False
    default: Any = None
    choices: tuple[Any, ...] = ()
    doc: str = ""

    def checked(self, value: Any) -> Any:
        """The value in its plain Python type.

        Raises:
            PluginError: another kind, or not one of the choices.
        """
        if not isinstance(value, _TYPES[self.kind]) or isinstance(value, bool):
            raise PluginError(f"attribute {self.name} is {value!r}; it must be of kind {self.kind}")
        if self.kind == "float":
            value = float(value)
        if self.kind == "ints":
            value = [int(each) for each in value]
        if self.choices and value not in self.choices:
            allowed = ", ".join(repr(each) for each in self.choices)
            raise PluginError(f"attribute {self.name} is {value!r}; it must be one of {allowed}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: as in the ONNX function.
        dtypes: allowed ones, in order of preference.
        shape: for the reader, for example ``[..., K]``.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSchema:
    """An operator.

    Attributes:
        name: op type, and name of the TensorRT plugin.
        version: of the TensorRT plugin.
        attributes: all of them.
        inputs: the list for these (resolved) attributes; TensorRT 8.6 has no optional inputs.
        outputs: likewise.
        function: the definition for these (resolved) attributes, in standard ONNX operators.
    """

    name: str
    attributes: tuple[Attribute, ...]
    inputs: Callable[[Mapping[str, Any]], tuple[TensorSpec, ...]]
    outputs: Callable[[Mapping[str, Any]], tuple[TensorSpec, ...]]
    function: Callable[[Mapping[str, Any]], onnx.FunctionProto]
    version: str = "1"

    def resolve(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """All attributes by name, with defaults filled in.

        Raises:
            PluginError: an unknown name, a missing required one, or a value of another kind.
        """
        known = {each.name: each for each in self.attributes}
        for name in attributes:
            if name not in known:
                raise PluginError(f"{self.name} has no attribute {name}{did_you_mean(name, known)}")
        missing = [each.name for each in self.attributes if each.required and each.name not in attributes]
        if missing:
            raise PluginError(f"{self.name} needs the attributes {list_names(missing)}")
        return {
            name: each.checked(attributes[name]) if name in attributes else each.default for name, each in known.items()
        }
