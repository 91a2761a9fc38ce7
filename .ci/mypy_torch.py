"""Mypy plugin: buffers and submodules, which torch types ``Tensor | Module``, are Any."""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type


def _as_any(context: AttributeContext) -> Type:
    found = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.special_form) if isinstance(found, UnionType) else found


class TorchPlugin(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        registered = fullname.startswith("torch.nn.modules.module.Module.")
        return _as_any if registered else None


def plugin(version: str) -> type[Plugin]:
    return TorchPlugin
