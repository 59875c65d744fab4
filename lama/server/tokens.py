"""/tokenize, /detokenize, /tokenizer_info and /apply-template, with vLLM's fields."""

import asyncio

from lama.errors import LamaError
from lama.server.answers import check_length
from lama.server.chat import read_conversation
from lama.server.fields import BadField, Body, boolean, refuse, token_ids
from lama.server.service import Backend, Service
from lama.tokenizers.base import encode_inside


async def tokenize(service: Service, body: Body) -> dict[str, object]:
    """The tokens of a text or of a conversation. Raises BadField."""
    backend = service.backend_for(body)
    found = await asyncio.to_thread(_tokens, backend, body)
    texts = [backend.piece(i)[0] for i in found] if boolean(body, "return_token_strs") else None
    return {"count": len(found), "max_model_len": backend.context, "tokens": found, "token_strs": texts}


def _tokens(backend: Backend, body: Body) -> list[int]:
    if body.get("messages") is not None:
        return read_conversation(backend, body)
    text, frame = body.get("prompt"), boolean(body, "add_special_tokens", default=True)
    if not isinstance(text, str):
        raise refuse("prompt", "be a text", text)
    check_length(backend, len(text), "prompt")
    try:
        return backend.tokenizer.encode(text) if frame else encode_inside(backend.tokenizer, text)
    except LamaError as error:
        raise BadField("prompt", f"prompt cannot be encoded: {error}") from None


async def detokenize(service: Service, body: Body) -> dict[str, object]:
    """The text of tokens. Raises BadField."""
    tokenizer = service.backend_for(body).tokenizer
    if body.get("tokens") == []:
        return {"prompt": ""}
    ids = token_ids(body, "tokens", tokenizer.vocab_size)
    return {"prompt": await asyncio.to_thread(tokenizer.decode, ids)}


async def tokenizer_info(service: Service, body: Body) -> dict[str, object]:
    """The model's special tokens and chat template."""
    backend = service.backend_for(body)
    end, template = backend.tokenizer.end_of_text, backend.template
    named = template.tokens if template is not None else {}
    own = None if end is None else backend.tokenizer.decode([end])
    return {
        "tokenizer_class": type(backend.tokenizer).__name__,
        "vocab_size": backend.tokenizer.vocab_size,
        "model_max_length": backend.context,
        "bos_token": named.get("bos_token"),
        "eos_token": named.get("eos_token", own),
        "pad_token": named.get("pad_token", own),
        "chat_template": None if template is None else template.source,
    }


async def apply_template(service: Service, body: Body) -> dict[str, object]:
    """The text and the tokens of a conversation, as the model gets it. Raises BadField."""
    backend = service.backend_for(body)
    tokens = await asyncio.to_thread(read_conversation, backend, body)
    return {"prompt": backend.tokenizer.decode(tokens), "tokens": tokens}
