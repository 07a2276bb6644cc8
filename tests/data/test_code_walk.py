"""What a walk over code takes for the same in every process: addresses, and what libraries derive from classes."""

from __future__ import annotations

import collections
import sys
import types
import uuid
import weakref
from typing import ClassVar

import pytest

from hf_freezecache.data.code_walk import changed_parts, walk_code


def digest(code) -> str:
    return walk_code(code).digest


# ---- Addresses inside texts ----

#: Objects that nothing but this module holds: no walk meets them.
_KEPT: list[object] = []


class Holder:
    pass


def holder_of(write, inner=None):
    """Make an object that holds another one, and what is written of it."""
    held = Holder()
    held.inner = Holder() if inner is None else inner
    write(held, held.inner)
    return held


def kept() -> Holder:
    _KEPT.append(Holder())
    return _KEPT[-1]


WRITTEN = {
    "decimal": lambda held, x: setattr(held, "name", f"module.Class:{id(x)}"),
    "decimal after a letter": lambda held, x: setattr(held, "name", f"Face{id(x)}and"),
    "hexadecimal": lambda held, x: setattr(held, "name", f"step_{id(x):x}_0"),
    "hexadecimal with 0x": lambda held, x: setattr(held, "name", hex(id(x))),
    "as Windows writes it": lambda held, x: setattr(held, "name", f"0x{id(x):016X}"),
    "twice": lambda held, x: setattr(held, "name", f"{id(x)}-{id(held):x}-{id(x)}"),
    "inside texts of a schema": lambda held, x: setattr(held, "schema", {"ref": [f"C:{id(x)}", {"of": (f"{id(x)}",)}]}),
    "number in a list": lambda held, x: setattr(held, "keys", [3, id(x), 0.5]),
    "key of a dict": lambda held, x: setattr(held, "table", {f"step {id(x)}": 1}),
    "name of an attribute": lambda held, x: setattr(held, f"hook_{id(x)}", 1),
    "name of a class": lambda held, x: setattr(held, "kind", type(f"Step{id(x)}", (), {})()),
    "name of a function": lambda held, x: setattr(held, "call", renamed(f"call_{id(x)}")),
    "text of an object that is gone": lambda held, x: setattr(held, "name", repr(Holder())),
    "hash": lambda held, x: setattr(held, "key", (hash(x), str(hash(x)))),
    "number of an object not met": lambda held, x: setattr(held, "key", id(kept())),
    "text of an object not met": lambda held, x: setattr(held, "key", f"at {id(kept())}"),
    "key of a weak dict": lambda held, x: setattr(held, "weak", weakref.WeakValueDictionary({id(x): x})),
}


def renamed(name):
    def call(batch):
        return batch

    call.__qualname__ = name
    return call


@pytest.mark.parametrize("how", WRITTEN)
def test_addresses_inside_texts_do_not_matter(how) -> None:
    one, other = holder_of(WRITTEN[how]), holder_of(WRITTEN[how])
    assert digest(one) == digest(other)
    other.inner.strength = 1
    assert digest(one) != digest(other)


def test_numbers_and_texts_that_are_no_addresses_matter() -> None:
    values = [
        140234512345600,
        94123456789024,
        "94123456789024",
        "94123456789040",
        "7f3a2b1c4d50",
        "0x7f3a2b1c4d50",
        "ffaa00",
    ]
    values += [
        "at 94123456789024",
        "Class:94123456789024",
        "cafe",
        2**24,
        2**24 + 16,
        "deadbeefdeadbeef",
        [2**24],
        [2**24 + 16],
    ]
    held = [holder_of(lambda held, x, value=value: setattr(held, "value", value)) for value in values]
    assert len({digest(each) for each in held}) == len(values)


def test_a_class_that_registers_itself_by_its_address_hashes_alike() -> None:
    def make(scale):
        class Registered:
            registry: ClassVar = {}

            def __init_subclass__(cls):
                cls.reference = f"{cls.__module__}.{cls.__qualname__}:{id(cls)}"
                cls.registry[cls.reference] = {"type": "model", "ref": cls.reference, "cls": cls}

        class Step(Registered):
            by = scale

            def __call__(self, batch):
                return batch

        return Step

    assert digest(make(1)()) == digest(make(1)())
    assert digest(make(1)()) != digest(make(2)())


def test_texts_with_addresses_that_a_call_changes_can_be_left_out() -> None:
    class Step:
        def __init__(self):
            self.seen, self.strength = "", 1

        def __call__(self, batch):
            self.seen += f"{id(self)} "
            return batch

    step = Step()
    before = walk_code(step)
    assert changed_parts(before, walk_code(step)) == frozenset()
    step(1)
    changed = changed_parts(before, walk_code(step))
    assert len(changed) == 1
    first = walk_code(step, changed).digest
    step(2)
    assert walk_code(step, changed).digest == first
    step.strength = 2
    assert walk_code(step, changed).digest != first


# ---- What libraries keep on classes ----


def model(fields, schema, decorators=(), module=__name__):
    """Make a class as pydantic does, with what it derives from the fields."""

    class Model:
        __module__ = module
        __pydantic_fields__ = fields
        __pydantic_decorators__ = decorators
        __pydantic_core_schema__ = schema
        __pydantic_validator__ = __pydantic_serializer__ = iter(())  # it cannot be taken apart
        __pydantic_complete__ = bool(schema)

    return Model


def test_what_is_derived_from_the_fields_of_a_class_does_not_matter() -> None:
    first = digest(model({"low": 1}, {"ref": "a"}))
    assert digest(model({"low": 1}, {}, ("before",))) == first
    assert digest(model({"low": 2}, {"ref": "a"})) != first
    # A script has no source that says so.
    assert digest(model({}, {}, ("before",), "__main__")) != digest(model({}, {}, ("after",), "__main__"))
    assert not walk_code(model({}, {})).unseen


def test_a_hash_of_texts_that_attrs_writes_does_not_matter() -> None:
    def frozen(text_hash, filename="<attrs generated methods Point>"):
        code = compile(f"def __hash__(self):\n    return hash(({text_hash}, self.x))", filename, "exec")
        variables: dict = {"__name__": __name__}
        exec(code, variables)
        return type("Point", (), {"x": 1, "__hash__": variables["__hash__"]})

    assert digest(frozen(2649703195057688969)()) == digest(frozen(-430590604680628945)())
    assert digest(frozen(3, "step.py")()) != digest(frozen(4, "step.py")())


def test_orders_of_dicts_of_other_classes_do_not_matter() -> None:
    items = [("a", 1), ("b", 2)]

    def filled(kind, order):
        made = kind()
        made.update(items[::order])
        return made

    class Ordered(collections.OrderedDict):
        pass

    for kind in (dict, lambda: collections.defaultdict(int), collections.Counter):
        assert digest(filled(kind, 1)) == digest(filled(kind, -1))
    assert digest(filled(Ordered, 1)) != digest(filled(Ordered, -1))
    assert digest(collections.Counter(a=1)) != digest(collections.Counter(a=2))


def test_a_text_that_is_drawn_when_a_module_is_imported_does_not_matter(tmp_path, monkeypatch) -> None:
    source = "import uuid\nSESSION = DRAW\nLOOK = 'a'\nclass Step:\n    token = DRAW\n    def run(self):\n        return SESSION, LOOK\n"

    def imported(draw) -> types.ModuleType:
        (tmp_path / "session_module.py").write_text(source.replace("DRAW", draw))
        sys.modules.pop("session_module", None)
        return __import__("session_module")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "session_module", None)
    for draw in ("uuid.uuid4().hex", "str(uuid.uuid4())"):
        first = digest(imported(draw).Step())
        assert digest(imported(draw).Step()) == first
    module = imported(draw)
    module.LOOK = uuid.UUID(int=1).hex
    assert digest(module.Step()) != first
    texts = [f"{number}0000000-0000-4000-8000-000000000000" for number in range(2)]
    assert digest(imported(repr(texts[0])).Step()) != digest(imported(repr(texts[1])).Step())
    held = [holder_of(lambda held, x, text=text: setattr(held, "folder", text)) for text in texts]
    assert digest(held[0]) != digest(held[1])
