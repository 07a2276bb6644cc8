"""Walks code and its state: a transform or collator, and everything of the user's own that it reaches.

Installed packages are taken by name. Code of the user's own project is followed: what it is made of, what it calls, and the
values that it reads. The digest is one of content: it is equal in every process in which these are equal.
"""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import hashlib
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .addresses import SMALLEST_ADDRESS, addresses_among, numbers_in, without_addresses
from .class_attributes import attributes_of
from .code_names import names_in, variables_and_imports
from .code_values import content_of, file_words, is_drawn
from .origin import INSTALLED, PROJECT, SCRIPT, is_importable, origin_of, source_hash

__all__ = ["CodeWalk", "changed_parts", "walk_code"]

#: Digests of one object: of all that it holds, and without what instances and functions inside it hold.
_Pair = tuple[bytes, bytes]
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range, slice})
_BUILTIN = (types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType)


def _hash(*words: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for word in words:
        data = word if isinstance(word, bytes) else word.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _leaf(*words: str | bytes) -> _Pair:
    digest = _hash(*words)
    return digest, digest


def _together(name: str, pairs: list[_Pair]) -> _Pair:
    return _hash(name, *(deep for deep, _ in pairs)), _hash(name, *(shallow for _, shallow in pairs))


class CodeWalk:
    """One walk over code and its state.

    Args:
        code: The transform or collator, or a tuple of them.
        skipped: Parts that do not count, as ``changed_parts`` gave them.
        addresses: Numbers that are addresses of objects (``id(step)``), which differ from process to process. They do
            not count, inside texts neither.
        special: Gives the digest of objects of certain types, and ``None`` of others.

    Attributes:
        digest: SHA-256 of everything that was reached, 64 hexadecimal digits.
        parts: Place of each attribute and variable -> digest of its value, without instances inside it.
        unseen: What could not be looked into, in words.
        addresses: Numbers that were met, inside texts as well, and are addresses of objects.

    Raises:
        TypeError: Something that ``code`` holds has no content that could be hashed; the message names the place.
    """

    def __init__(
        self,
        code: Any,
        skipped: frozenset[str] = frozenset(),
        addresses: frozenset[int] = frozenset(),
        special: Callable[[Any], str | None] = lambda value: None,
    ) -> None:
        self.parts: dict[str, bytes] = {}
        self.unseen: dict[str, None] = {}
        self._skipped, self._known_addresses, self._special = skipped, addresses, special
        self._large: set[int] = set()
        # Objects are kept alive with their digests: what is made on the way must not give its address to the next.
        self._done: dict[int, tuple[Any, _Pair]] = {}
        self._begun: set[int] = set()
        self._sources: dict[str, str] = {}
        self.digest = self._visit(code, "code")[0].hex()
        self.addresses = addresses_among(self._large, self._done)

    # ---- One object ----

    def _visit(self, value: Any, place: str) -> _Pair:
        kind = type(value)
        if kind in _PLAIN:
            return self._plain(value)
        known = self._done.get(id(value))
        if known is not None:
            return known[1]
        if id(value) in self._begun:
            return _leaf("circle")
        self._begun.add(id(value))
        try:
            pair = self._look(value, place)
        finally:
            self._begun.discard(id(value))
        self._done[id(value)] = (value, pair)
        return pair

    def _plain(self, value: Any) -> _Pair:
        if type(value) is int and value >= SMALLEST_ADDRESS:
            if value in self._known_addresses:
                return _leaf("address")
            self._large.add(value)
        if type(value) is str:
            return _leaf("text", self._text(value), *file_words(value))
        return _leaf(type(value).__name__, value if type(value) is bytes else repr(value))

    def _text(self, text: str) -> str:
        """Return a text without the addresses in it."""
        self._large |= numbers_in(text)
        return without_addresses(text, self._known_addresses)

    def _look(self, value: Any, place: str) -> _Pair:
        exact = self._EXACT.get(type(value))
        if exact is not None:
            return exact(self, value, place)
        for kinds, look in self._LOOKS:
            if isinstance(value, kinds):
                return look(self, value, place)
        words = content_of(value)
        if words is not None:
            return _leaf(*(self._text(word) if isinstance(word, str) else word for word in words))
        digest = self._special(value)
        return self._instance(value, place) if digest is None else _leaf("special", digest)

    def _part(self, value: Any, place: str) -> _Pair:
        """Visit the value of an attribute or a variable."""
        if place in self._skipped:
            return _leaf("changes by itself")
        pair = self._visit(value, place)
        self.parts[place] = pair[1]
        return pair

    def _parts(self, values: Mapping[str, Any], place: str, lenient: bool = False, note: bool = True) -> _Pair:
        """Visit named values, in the order of their names.

        Args:
            values: Values by name.
            place: Where they are.
            lenient: Take only the type of what cannot be hashed: it may not matter.
            note: Whether to note what cannot be hashed.
        """
        pairs = []
        for name, value in sorted(values.items(), key=lambda item: self._text(str(item[0]))):
            try:
                pair = self._part(value, f"{place}.{name}")
            except Exception:
                if not lenient:
                    raise
                if note:
                    self.unseen[f"{place}.{name} ({type(value).__name__})"] = None
                pair = _leaf("unseen", type(value).__qualname__)
            pairs += [_leaf(self._text(str(name))), pair]
        return _together("names", pairs)

    # ---- Containers and values ----

    def _sequence(self, value: Any, place: str) -> _Pair:
        if set(map(type, value)) <= {int, float}:
            self._large.update(number for number in value if type(number) is int and number >= SMALLEST_ADDRESS)
            if self._known_addresses.isdisjoint(value):
                return _leaf(type(value).__name__, repr(value))
        pairs = [self._visit(item, f"{place}[{number}]") for number, item in enumerate(value)]
        return _together(type(value).__name__, pairs)

    def _set(self, value: Any, place: str) -> _Pair:
        # The order differs between processes. What is visited first decides what is a circle.
        def name(item: Any) -> tuple[str, ...]:
            text = str(item) if type(item) in _PLAIN else str(getattr(item, "__qualname__", ""))
            return type(item).__qualname__, text

        pairs = [self._visit(item, f"{place}{{}}") for item in sorted(value, key=name)]
        deep, shallow = sorted(deep for deep, _ in pairs), sorted(shallow for _, shallow in pairs)
        return _hash(type(value).__name__, *deep), _hash(type(value).__name__, *shallow)

    def _dict(self, value: Any, place: str) -> _Pair:
        items = []
        for key, item in value.items():
            pairs = [self._visit(key, f"{place}.keys"), self._visit(item, f"{place}[{str(key)[:80]}]")]
            items.append(_together("item", pairs))
        # Dicts are often filled from sets, whose order differs between processes; and their order rarely matters.
        return _together(type(value).__name__, items if type(value) is collections.OrderedDict else sorted(items))

    # ---- Functions, classes and modules ----

    def _source(self, module: str) -> str:
        if module not in self._sources:
            self._sources[module] = source_hash(module)
        return self._sources[module]

    def _function(self, value: types.FunctionType, place: str) -> _Pair:
        module, origin = value.__module__ or "", origin_of(value.__module__ or "")
        name = self._text(f"{'' if origin == SCRIPT else module}:{value.__qualname__}")
        if origin == INSTALLED and is_importable(value):
            return _leaf("function", name)
        cells = {}
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # it has no value yet
                cells[variable] = cell.cell_contents
        cells.pop("__class__", None)
        inside, own = f"{module}:{value.__qualname__}", origin != INSTALLED
        defaults = {"defaults": value.__defaults__, **(value.__kwdefaults__ or {})}
        pairs = [
            _leaf("function", name),
            *self._variables(cells, f"{place}.{inside}()", names_in(value.__code__), not own, own),
            self._parts(defaults, f"{place}.{inside}.defaults", not own, own),
            self._parts(vars(value), f"{place}.{inside}", not own, own),
        ]
        if own:
            pairs += [_leaf("source", self._source(module)), *self._code(value.__code__, inside)]
            pairs += self._references(value.__code__, value.__globals__)
        return _together("function", pairs)[0], _hash("function", name)

    def _code(self, code: types.CodeType, place: str) -> list[_Pair]:
        """Visit a code object by its content, without names of files and numbers of lines."""
        numbers = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        pairs = [_leaf("code", code.co_code, repr(numbers), repr(names))]
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                pairs += self._code(constant, place)
            else:
                pairs.append(self._visit(constant, f"{place}.constants"))
        return pairs

    def _references(self, code: types.CodeType, variables: dict[str, Any]) -> list[_Pair]:
        """Visit the global variables that code reads, and the modules that it imports when it runs."""
        read, imported = variables_and_imports(code, str(variables.get("__package__") or ""))
        names, module = names_in(code), str(variables.get("__name__", ""))
        pairs = self._variables({name: variables[name] for name in read & variables.keys()}, module, names)
        for name in sorted(imported & sys.modules.keys()):
            pairs += self._module(sys.modules[name], names)
        return pairs

    def _variables(
        self, values: dict[str, Any], place: str, names: Sequence[str], lenient: bool = True, note: bool = True
    ) -> list[_Pair]:
        """Visit variables that code with these names in it reads."""
        modules = {name: value for name, value in values.items() if isinstance(value, types.ModuleType)}
        others = {name: value for name, value in values.items() if name not in modules}
        if origin_of(place) == PROJECT:  # the source says such a text, or it is drawn when the module is imported
            others = {name: value for name, value in others.items() if not is_drawn(value)}
        pairs = [self._parts(others, place, lenient, note)]
        for name in sorted(modules):
            pairs += self._module(modules[name], names)
        return pairs

    def _module(self, module: types.ModuleType, names: Sequence[str]) -> list[_Pair]:
        """Visit what code with these names in it can take from a module of the user's own."""
        if origin_of(module.__name__) != PROJECT or id(module) in self._begun:
            return [_leaf("module", module.__name__)]
        self._begun.add(id(module))  # modules may hold each other
        try:
            variables = vars(module)
            values = {name: variables[name] for name in names if name in variables}
            source = _leaf("module", module.__name__, self._source(module.__name__))
            return [source, *self._variables(values, module.__name__, names)]
        finally:
            self._begun.discard(id(module))

    def _module_by_itself(self, value: types.ModuleType, place: str) -> _Pair:
        self._begun.discard(id(value))  # it is being visited: else it would be taken for a circle
        return _together("module", self._module(value, [name for name in vars(value) if not name.startswith("__")]))

    def _class(self, value: type, place: str) -> _Pair:
        module, origin = value.__module__, origin_of(value.__module__)
        name = self._text(f"{'' if origin == SCRIPT else module}:{value.__qualname__}")
        if origin == INSTALLED:
            return _leaf("class", name)
        inside = f"{module}:{value.__qualname__}"
        pairs = [
            _leaf("class", name, self._source(module)),
            *(self._visit(base, f"{inside}.bases") for base in value.__bases__),
            self._parts(attributes_of(value, origin == PROJECT), inside, lenient=True),
        ]
        return _together("class", pairs)[0], _hash("class", name)

    def _method(self, value: Any, place: str) -> _Pair:
        pairs = [self._visit(value.__func__, place), self._visit(value.__self__, f"{place}.__self__")]
        return _together("method", pairs)[0], _hash("method", value.__func__.__qualname__)

    def _builtin(self, value: Any, place: str) -> _Pair:
        owner = getattr(value, "__self__", None)
        module = str(getattr(value, "__module__", None))
        pairs = [_leaf("builtin", module, value.__qualname__)]
        if origin_of(module) == PROJECT:  # compiled by the user
            pairs.append(_leaf("source", self._source(module)))
        if owner is not None and not isinstance(owner, types.ModuleType):
            pairs.append(self._visit(owner, f"{place}.__self__"))
        return _together("builtin", pairs)

    def _descriptor(self, value: Any, place: str) -> _Pair:
        if isinstance(value, property):
            pairs = [self._visit(each, place) for each in (value.fget, value.fset)]
        else:
            pairs = [self._visit(value.__func__, place)]
        return _together(type(value).__name__, pairs)

    def _partial(self, value: Any, place: str) -> _Pair:
        pairs = [self._visit(value.func, f"{place}.func"), self._visit(value.args, f"{place}.args")]
        pairs += [self._parts(value.keywords, f"{place}.keywords"), self._parts(vars(value), place)]
        return _together("partial", pairs)

    def _wrapped(self, value: Any, place: str) -> _Pair:
        return _together("cached", [self._visit(value.__wrapped__, place)])

    def _member(self, value: enum.Enum, place: str) -> _Pair:
        module = type(value).__module__
        name = f"{'' if origin_of(module) == SCRIPT else module}:{type(value).__qualname__}.{value.name}"
        return _together("member", [_leaf(name, self._source(module)), self._visit(value.value, f"{place}.value")])

    # ---- Any other instance ----

    def _instance(self, value: Any, place: str) -> _Pair:
        kind = type(value)
        name = self._text(f"{kind.__module__}.{kind.__qualname__}")
        shared = getattr(value, "get_obj", None)
        if shared is not None and kind.__module__.startswith("multiprocessing."):
            return self._part(getattr(shared(), "value", None), f"{place}.value")
        try:
            reduced = self._reduce(value)
        except Exception as error:
            raise TypeError(f"{place} is a {kind.__qualname__}: {error}") from error
        if isinstance(reduced, str):
            return _leaf("global", name, reduced)
        make, arguments, state, items, pairs_of_dict = (*reduced, None, None, None, None)[:5]
        pairs = [self._visit(kind, f"{place}.__class__"), self._visit(make, f"{place}.__reduce__")]
        pairs += [self._visit(each, f"{place}({number})") for number, each in enumerate(arguments or ())]
        if isinstance(state, tuple) and len(state) == 2 and all(isinstance(each, (dict, type(None))) for each in state):
            state = {**(state[0] or {}), **(state[1] or {})}
        pairs.append(self._parts(state, place) if isinstance(state, dict) else self._part(state, f"{place}.state"))
        if items is not None:
            pairs.append(self._part(list(items), f"{place}.items"))
        if pairs_of_dict is not None:
            ordered = isinstance(value, collections.OrderedDict)
            pairs.append(self._part((list if ordered else dict)(pairs_of_dict), f"{place}.items"))
        return _together(name, pairs)[0], _hash("instance", name)

    @staticmethod
    def _reduce(value: Any) -> Any:
        reduce = copyreg.dispatch_table.get(type(value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # iterators will lose this one day
            return reduce(value) if reduce is not None else value.__reduce_ex__(4)

    _EXACT: Mapping[type, Callable[[Any, Any, str], _Pair]] = {
        **dict.fromkeys((list, tuple), _sequence),
        **dict.fromkeys((set, frozenset), _set),
        **dict.fromkeys((dict, collections.OrderedDict, types.MappingProxyType), _dict),
    }
    _LOOKS: tuple[tuple[Any, Callable[[Any, Any, str], _Pair]], ...] = (
        (types.FunctionType, _function),
        (type, _class),
        (enum.Enum, _member),
        (types.MethodType, _method),
        (_BUILTIN, _builtin),
        (types.ModuleType, _module_by_itself),
        (functools.partial, _partial),
        (functools._lru_cache_wrapper, _wrapped),
        ((property, staticmethod, classmethod), _descriptor),
    )


def walk_code(
    code: Any, skipped: frozenset[str] = frozenset(), special: Callable[[Any], str | None] = lambda value: None
) -> CodeWalk:
    """Walk over code and its state; see ``CodeWalk``."""
    walk = CodeWalk(code, skipped, special=special)
    return CodeWalk(code, skipped, walk.addresses, special) if walk.addresses else walk


def changed_parts(before: CodeWalk, after: CodeWalk) -> frozenset[str]:
    """Return the places of the attributes and variables whose values differ between two walks over the same code."""
    places = before.parts.keys() | after.parts.keys()
    return frozenset(place for place in places if before.parts.get(place) != after.parts.get(place))
