"""Whose code an error was raised in: that of a plugin's part, which the message then names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from diffkit.registry import Part

if TYPE_CHECKING:
    from torch import nn


def culprit(
    error: BaseException, parts: Sequence[Part], networks: Sequence[nn.Module] = ()
) -> tuple[Part, BaseException] | None:
    """The part in whose code the error was raised, or one that it came of; and that error.

    The innermost call counts: of a part's function, or of a layer of the networks, which is the backbone's. Failing
    that, it is a part of the package whose code it was.
    """
    backbone = next((part for part in parts if part.kind == "backbones"), None)
    layers = {id(layer) for network in networks for layer in network.modules()} if backbone else set()
    for each in _causes(error):
        frames = list(_frames(each))[::-1]
        for frame in frames:
            if part := next((part for part in parts if _code(part) is frame.f_code), None):
                return part, each
            if backbone and id(frame.f_locals.get("self")) in layers:
                return backbone, each
        for frame in frames:
            package = str(frame.f_globals.get("__name__", "")).split(".")[0]
            if part := next((part for part in parts if _package(part) == package), None):
                return part, each
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came of, the earliest first: that is where it began."""
    chain, next_one = [error], error.__cause__ or error.__context__
    while next_one is not None and next_one not in chain:
        chain.append(next_one)
        next_one = next_one.__cause__ or next_one.__context__
    return reversed(chain)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _code(part: Part) -> CodeType | None:
    """Of the part's function; None where it is a callable of another kind."""
    function: Any = part.function
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__code__", None)


def _package(part: Part) -> str:
    return part.where.split(":")[0].split(".")[0]
