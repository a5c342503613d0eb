"""What all kinds share: messages that say wanted and got, and the shape of a part's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

Expect = Callable[[bool, str, object], None]
Options = dict[str, Any]


def expectations(function: Callable[..., Any]) -> Expect:
    """`expect(true, wanted, got)` for one part, named in its messages."""
    name = getattr(function, "__name__", repr(function))

    def expect(condition: bool, wanted: str, got: object) -> None:
        if not condition:
            raise AssertionError(f"{name}: wanted {wanted}, got {got}.")

    return expect


def check_signature(
    expect: Expect,
    function: Callable[..., Any],
    positional: int,
    options: Options,
    required: Iterable[str] = (),
) -> None:
    """The contract's positional parameters, then options: keyword-only, annotated, with a default.

    An option may lack a default if the host fills it in (`required`) or if this check was given it.
    """
    parameters = inspect.signature(function).parameters.values()
    first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    listed = f"{len(first)} ({', '.join(p.name for p in first)})"
    wanted = f"{positional} positional parameters before the keyword-only options"
    expect(len(first) == positional, wanted, listed)
    for p in parameters:
        expect(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD), "every option by its own name", str(p))
        if p.kind is p.KEYWORD_ONLY:
            expect(p.annotation is not p.empty, f"a type annotation on option '{p.name}'", "none")
            known = p.default is not p.empty or p.name in required or p.name in options
            expect(known, f"a default for option '{p.name}'", "none")
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        expect(name in names, f"one of the options {names}", f"'{name}'")


def required_options(function: Callable[..., Any]) -> set[str]:
    """Names of the keyword-only parameters without a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


# Schedules and predictions.
