"""Further endpoints: embeddings, activations, the logit lens and attention."""

import asyncio
import base64
from dataclasses import dataclass
from functools import partial

from lama.generation.engine import Request
from lama.server.completions import read_prompt
from lama.server.embeddings import embed
from lama.server.errors import Refused
from lama.server.fields import Body, choice, refuse
from lama.server.inside import attention, internals, lens, read_text, to_json, to_npz
from lama.server.schema import check_absent
from lama.server.service import Backend, Service
from lama.shapes import Array

KNOWN = ("model", "input", "encoding_format", "dimensions", "user")
INSIDE = {"internals": internals, "lens": lens, "attention": attention}


@dataclass(frozen=True)
class Content:
    """An answer that is ready to be sent."""

    content: bytes
    media_type: str = "application/json"


async def embeddings(service: Service, body: Body) -> dict[str, object]:
    """The embedding of each input: the mean of the last hidden states, of length 1. Raises BadField."""
    backend = service.backend_for(body)
    service.note_unused(body, KNOWN)
    check_absent(body, "dimensions", "an embedding has the model's d_model numbers")
    form = choice(body, "encoding_format", ("float", "base64"))
    inputs = await asyncio.to_thread(_inputs, service, body)
    data: list[dict[str, object]] = []
    for i, tokens in enumerate(inputs):
        vector: Array = await backend.worker.run(partial(embed, backend.model, tokens))
        written = vector.tolist() if form == "float" else base64.b64encode(vector.tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": written})
    n = sum(map(len, inputs))
    usage = {"prompt_tokens": n, "total_tokens": n}
    return {"object": "list", "model": backend.name, "data": data, "usage": usage}


def _inputs(service: Service, body: Body) -> list[list[int]]:
    value, most = body.get("input"), service.limits.max_n
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise refuse("input", f"be a text, token ids, or a list of 1 to {most} of either", value)
    return [read_prompt(service.backend_for(body), each, "input")[1] for each in value]


async def inside(service: Service, body: Body, name: str) -> Content:
    """The answer of a function of `lama.server.inside`: internals, lens or attention. Raises BadField."""
    if not service.internals:
        raise Refused(403, "activations are switched off here (--no-internals)", code="no_internals")
    backend = service.backend_for(body)
    if name == "internals" and body.get("max_tokens"):
        body = await continued(backend, body)
    answer = await backend.worker.run(partial(INSIDE[name], backend.model, backend.tokenizer, body))
    if name == "internals" and body.get("format") == "npz":
        return Content(await asyncio.to_thread(to_npz, answer), "application/octet-stream")
    return Content(await asyncio.to_thread(to_json, answer))


async def continued(backend: Backend, body: Body) -> Body:
    """The request with its prompt continued by up to `max_tokens` greedy tokens. Raises BadField."""
    tokens, n = await backend.worker.run(partial(read_text, backend.model, backend.tokenizer, body))
    with backend.worker.answering([Request(tokens, n, end=backend.end, engine=backend.engine)]) as events:
        found = [event.token async for _, event in events if event.error is None]
    new = [token for token in found if token is not None and token not in backend.end]
    return {**body, "prompt": [*tokens, *new], "max_tokens": 0}
