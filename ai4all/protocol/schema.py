"""The JSON Schema of the wire, made from the message models."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from ai4all.protocol.messages import PROTOCOL_VERSION, ClientMessage, ServerMessage
from ai4all.types.task import INPUT_MODELS

__all__ = ["wire_schema"]

_REF = "#/$defs/{model}"


def wire_schema() -> dict[str, Any]:
    """Build the JSON Schema (draft 2020-12) of every frame, in both directions.

    A frame is valid against ``$defs/ClientMessage`` or ``$defs/ServerMessage``; the whole schema
    takes either. The input of an assignment is held to the model of its task type.
    """
    definitions: dict[str, Any] = {}
    unions: dict[str, Any] = {"ClientMessage": ClientMessage, "ServerMessage": ServerMessage}
    for name, union in unions.items():
        schema = TypeAdapter(union).json_schema(ref_template=_REF)
        definitions.update(schema.pop("$defs"))
        definitions[name] = schema
    _, inputs = models_json_schema(
        [(model, "validation") for model in INPUT_MODELS.values()], ref_template=_REF
    )
    definitions.update(inputs["$defs"])
    definitions["Assignment"]["allOf"] = [
        {
            "if": {"properties": {"task_type": {"const": task_type.value}}},
            "then": {"properties": {"input": {"$ref": _REF.format(model=model.__name__)}}},
        }
        for task_type, model in INPUT_MODELS.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"AI4ALL worker protocol {PROTOCOL_VERSION}",
        "oneOf": [
            {"$ref": _REF.format(model="ClientMessage")},
            {"$ref": _REF.format(model="ServerMessage")},
        ],
        "$defs": dict(sorted(definitions.items())),
    }
