"""A flow's parameters, made from pydantic models. Owns: the signature that Prefect turns into a form and a schema.
Must not know: what the parameters mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

_F = TypeVar("_F", bound=Callable[..., Any])


def with_fields_of(*models: type[BaseModel]) -> Callable[[_F], _F]:
    """Gives a function of `**settings` one keyword parameter for each field of `models`: with its type, its bounds,
    its default and its description.

    Flat, not one parameter that is the model: so `-p source=…` works, and the server names the very field it refuses.
    """

    fields = {name: field for model in models for name, field in model.model_fields.items()}

    def decorate(function: _F) -> _F:
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.get_default(),
                annotation=Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation,
            )
            for name, field in fields.items()
        ]
        # Prefect takes descriptions from the docstring alone.
        lines = [f"    {name}: {field.description}" for name, field in fields.items() if field.description]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", *lines])
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return function

    return decorate
