"""OpenAPI description of the server, with examples: ``/openapi.json`` and the page ``/docs``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from dsbs.serving.chat_completions import ChatForm, CompletionForm, PredictForm

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGES = frozenset({"/docs", "/docs/oauth2-redirect", "/openapi.json"})
_REFERENCE = "#/components/schemas/{model}"
_ROUTED = {"source": "student", "confidence": 0.97, "threshold": 0.91}  # with --fallback
_USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
_FORMS: dict[str, type[BaseModel]] = {
    "/predict": PredictForm,
    "/v1/completions": CompletionForm,
    "/v1/chat/completions": ChatForm,
}
_SUMMARIES = {
    "/predict": "Labels, probabilities and, on request, rationales",
    "/v1/completions": "The label as a completion, in OpenAI's format",
    "/v1/chat/completions": "The label as a chat completion, in OpenAI's format",
    "/v1/models": "The student's name",
    "/health": "Whether the server is ready, and whether an audit closed the student",
    "/metrics": "Counters and gauges for Prometheus",
}
_REQUESTS: dict[str, Any] = {
    "/predict": {"inputs": ["I was charged twice.", "Where is my parcel?"]},
    "/v1/completions": {"model": "student", "prompt": "I was charged twice."},
    "/v1/chat/completions": {
        "model": "student",
        "messages": [{"role": "user", "content": "I was charged twice."}],
    },
}
_RESPONSES: dict[str, Any] = {
    "/predict": {
        "predictions": [
            {
                "label": "billing",
                "raw": "billing",
                "probability": 0.97,
                "truncated": False,
                "distribution": {"billing": 0.97, "shipping": 0.03},
                **_ROUTED,
            }
        ],
        "student": "step-by-step-gold-s0",
    },
    "/v1/completions": {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1767225600,
        "model": "step-by-step-gold-s0",
        "choices": [
            {"index": 0, "text": "billing", "finish_reason": "stop", "logprobs": None, **_ROUTED}
        ],
        "usage": _USAGE,
    },
    "/v1/chat/completions": {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "step-by-step-gold-s0",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "billing", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
                **_ROUTED,
            }
        ],
        "usage": _USAGE,
    },
    "/v1/models": {
        "object": "list",
        "data": [{"id": "step-by-step-gold-s0", "object": "model", "owned_by": "dsbs"}],
    },
    "/health": {"status": "ready", "student": "step-by-step-gold-s0"},
}


def described(path: str) -> dict[str, Any]:
    """The arguments of a route that describe it."""
    extra: dict[str, Any] = {}
    if path in _FORMS:
        schema = {"$ref": _REFERENCE.format(model=_FORMS[path].__name__)}
        content = {"application/json": {"schema": schema, "example": _REQUESTS[path]}}
        extra["requestBody"] = {"required": True, "content": content}
    media = "application/json" if path in _RESPONSES else "text/plain"
    content = {media: {"example": _RESPONSES.get(path, "dsbs_ready 1")}}
    return {
        "summary": _SUMMARIES[path],
        "openapi_extra": extra,
        "responses": {200: {"description": "Answered", "content": content}},
    }


def add_documentation(app: FastAPI, *, has_token: bool) -> None:
    """Give the description the schemas of the bodies and, where there is one, the token."""
    from fastapi.openapi.utils import get_openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas: dict[str, Any] = {}
            for form in _FORMS.values():
                schema = form.model_json_schema(ref_template=_REFERENCE)
                schemas |= schema.pop("$defs", {})
                schemas[form.__name__] = schema
            components: dict[str, Any] = {"schemas": schemas}
            if has_token:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                description["security"] = [{"token": []}]
            description["components"] = components
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
