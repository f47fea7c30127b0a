"""``dataclasses``, as far as it is used here, at a tenth of its cost: a hook has none to spend.

The standard library's compiles five functions for each class, which was a third of a hook's time. Here all
classes share how they compare, hash and print, and ``__init__`` is compiled when the first object is made.
Every class has slots. Type checkers see the standard library's.
"""

# What is typed is the standard library's.
# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN202, ANN204

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass, field, fields, replace
else:
    from operator import attrgetter

    class _Missing:
        """No default."""

    class Field:
        """What a class says of one field; ``type`` is its annotation's text."""

        __slots__ = ("default", "default_factory", "init", "name", "type")
        _field_type = None  # what dataclasses.replace() looks for

        def __init__(self, default=_Missing, default_factory=_Missing):
            self.default, self.default_factory, self.init = default, default_factory, True

    def field(*, default_factory):
        """A field whose default is made for each object."""
        return Field(default_factory=default_factory)

    def dataclass(*, frozen=False, slots=True, order=False):
        """As ``dataclasses.dataclass``, with slots in any case."""
        del slots
        return lambda cls: _make(cls, frozen=frozen, order=order)

    def fields(cls):
        """The fields of a class, in order."""
        return tuple(cls.__dataclass_fields__.values())

    def replace(of, /, **changes):
        """A copy with other values for some fields."""
        for name in of.__match_args__:
            if name not in changes:
                changes[name] = getattr(of, name)
        return type(of)(**changes)

    def _make(cls, *, frozen, order):
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        found = {}
        for name, kind in cls.__annotations__.items():
            if kind.startswith("ClassVar"):
                continue
            value = own.pop(name, _Missing)
            found[name] = one = value if isinstance(value, Field) else Field(value)
            one.name, one.type = name, kind
        names = tuple(found)
        methods = {"__eq__": _eq, "__repr__": _repr, "__hash__": _hash if frozen else None}
        if frozen:
            methods |= {"__setattr__": _refuse, "__delattr__": _refuse}
        if order:
            methods |= {"__lt__": _lt, "__le__": _le, "__gt__": _gt, "__ge__": _ge}
        made = type(cls)(
            cls.__name__,
            cls.__bases__,
            {
                **methods,
                **own,
                "__slots__": names,
                "__match_args__": names,
                "__dataclass_fields__": found,
                "_values": attrgetter(*names) if names else staticmethod(lambda _: ()),
            },
        )
        made.__qualname__ = cls.__qualname__

        def __init__(self, *args, **kwargs):  # noqa: N807 - the class's, until it is called
            made.__init__ = _compile_init(made)
            made.__init__(self, *args, **kwargs)

        made.__init__ = __init__
        return made

    def _compile_init(cls):
        given, lines, values = [], [], {"_made": _Missing}
        for name, one in cls.__dataclass_fields__.items():
            values[f"_set_{name}"] = vars(cls)[name].__set__
            if one.default_factory is not _Missing:
                values[f"_make_{name}"] = one.default_factory
                given.append(f"{name}=_made")
                lines.append(f"_set_{name}(self, _make_{name}() if {name} is _made else {name})")
                continue
            if one.default is not _Missing:
                values[f"_default_{name}"] = one.default
            given.append(name if one.default is _Missing else f"{name}=_default_{name}")
            lines.append(f"_set_{name}(self, {name})")
        exec(f"def __init__(self, {', '.join(given)}):\n " + "\n ".join(lines or ["pass"]), values)  # noqa: S102
        made = values["__init__"]
        made.__qualname__ = f"{cls.__qualname__}.__init__"
        return made

    def _refuse(self, name, *_):
        raise AttributeError(f"cannot change {name!r} of a {type(self).__name__}")

    def _repr(self):
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
        return f"{type(self).__qualname__}({values})"

    def _hash(self):
        return hash(self._values(self))

    def _eq(self, other):
        return self._values(self) == self._values(other) if type(other) is type(self) else NotImplemented

    def _lt(self, other):
        return self._values(self) < self._values(other) if type(other) is type(self) else NotImplemented

    def _le(self, other):
        return self._values(self) <= self._values(other) if type(other) is type(self) else NotImplemented

    def _gt(self, other):
        return self._values(self) > self._values(other) if type(other) is type(self) else NotImplemented

    def _ge(self, other):
        return self._values(self) >= self._values(other) if type(other) is type(self) else NotImplemented


__all__ = ["dataclass", "field", "fields", "replace"]
