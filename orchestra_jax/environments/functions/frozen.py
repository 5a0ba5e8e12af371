"""Records that cannot be changed, and copies of them that can.

A database is loaded once and shared by every episode, so nothing may write into it. `freeze` puts guards of the same
shape in the place of the containers: a guarded list is a list, a guarded record an instance of its own pydantic model,
and reading costs nothing; writing raises. `thaw` makes a copy that can be written.
"""

from __future__ import annotations

import functools

from pydantic import BaseModel


def _refuse(self, *_, **__):
    raise TypeError(f"this {type(self).__name__} is shared by all episodes: take the entry from its table by its key")


@functools.cache
def _frozen_model(model: type[BaseModel]) -> type[BaseModel]:
    """A subclass whose instances refuse to be written; the same data, methods and isinstance."""
    copies = {"__copy__": thaw, "__deepcopy__": lambda self, memo=None: thaw(self)}
    guards = {"__setattr__": _refuse, "__delattr__": _refuse, "__module__": model.__module__, **copies}
    frozen = type(model)(model.__name__, (model,), guards)
    frozen.thawed_model = model
    return frozen


def model_of(record: BaseModel) -> type[BaseModel]:
    """The model of a record, whether it is frozen or not."""
    return getattr(type(record), "thawed_model", type(record))


def _with_fields(model: type[BaseModel], record: BaseModel, fields: dict[str, object]) -> BaseModel:
    """An instance without validation: pydantic's own deep copy has none either, and is slow."""
    made = model.__new__(model)
    object.__setattr__(made, "__dict__", fields)
    object.__setattr__(made, "__pydantic_fields_set__", set(record.__pydantic_fields_set__))
    object.__setattr__(made, "__pydantic_extra__", record.__pydantic_extra__)
    object.__setattr__(made, "__pydantic_private__", record.__pydantic_private__)
    return made


def freeze(value):
    """`value` with every list, dict and record in it replaced by a guarded copy; what is frozen already stays."""
    if isinstance(value, BaseModel):
        model = type(value)
        if hasattr(model, "thawed_model"):
            return value
        fields = {name: freeze(each) for name, each in value.__dict__.items()}
        return _with_fields(_frozen_model(model), value, fields)
    if type(value) in (FrozenList, FrozenDict):
        return value
    if isinstance(value, list):
        return FrozenList(map(freeze, value))
    if isinstance(value, dict):
        return FrozenDict((key, freeze(each)) for key, each in value.items())
    if isinstance(value, tuple):
        return tuple(map(freeze, value))
    if isinstance(value, (set, bytearray)):
        raise ValueError(f"a database holds {value!r}, a {type(value).__name__}: JSON has none, make it a list")
    return value


def thaw(value):
    """A copy that can be written and shares nothing that can."""
    if isinstance(value, BaseModel):
        fields = {name: thaw(each) for name, each in value.__dict__.items()}
        return _with_fields(model_of(value), value, fields)
    if isinstance(value, list):
        return [thaw(each) for each in value]
    if isinstance(value, dict):
        return {key: thaw(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(thaw, value))
    return value


_WRITING = "append extend insert pop popitem remove clear sort reverse update setdefault".split()
_OPERATORS = "__setitem__ __delitem__ __iadd__ __imul__ __ior__".split()


def _guarded(name: str, kind: type) -> type:
    refusals = {method: _refuse for method in (*_WRITING, *_OPERATORS) if hasattr(kind, method)}
    copies = {"copy": thaw, "__copy__": thaw, "__deepcopy__": lambda self, memo: thaw(self)}
    return type(name, (kind,), {**refusals, **copies, "__slots__": ()})


FrozenList = _guarded("FrozenList", list)
FrozenDict = _guarded("FrozenDict", dict)


def is_same(first, second) -> bool:
    """Whether both are one JSON value: frozen or not, order of keys aside, 1 and 1.0 and true told apart."""
    if first is second:
        return True
    if isinstance(first, BaseModel):
        return isinstance(second, BaseModel) and is_same(first.__dict__, second.__dict__)
    if isinstance(first, dict):
        is_like = isinstance(second, dict) and len(first) == len(second)
        return is_like and all(key in second and is_same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        is_like = isinstance(second, (list, tuple)) and len(first) == len(second)
        return is_like and all(map(is_same, first, second))
    return type(first) is type(second) and first == second
