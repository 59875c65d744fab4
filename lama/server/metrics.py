"""Metrics of the server, the rows of the cache, and the list of models. They contain no prompts."""

from lama.server.fields import Body
from lama.server.service import Service


def metrics(service: Service) -> str:
    """All metrics in Prometheus' text format."""
    worker = service.backend.worker
    counts, engine = worker.counts, worker.engine
    running = engine.n_running
    statuses = {f'{{status="{status}"}}': n for status, n in sorted(service.statuses.items())}
    found: dict[str, tuple[str, str, float | dict[str, int]]] = {
        "prompt_tokens_total": ("counter", "Tokens of prompts", counts.prompt_tokens),
        "prompt_tokens_cached_total": ("counter", "Tokens of prompts from the cache", counts.cached_tokens),
        "tokens_predicted_total": ("counter", "Generated tokens", counts.predicted_tokens),
        "n_decode_total": ("counter", "Steps of the engine", counts.steps),
        "n_busy_slots_total": ("counter", "Sum of the rows that were busy in each step", counts.busy_rows),
        "n_busy_slots_per_decode": ("gauge", "Mean per step", counts.busy_rows / max(1, counts.steps)),
        "requests_processing": ("gauge", "Requests that have a row", running),
        "requests_deferred": ("gauge", "Requests that wait for a row", max(0, worker.n_admitted - running)),
        "requests_total": ("counter", "Answers over HTTP", statuses),
    }
    lines: list[str] = []
    for name, (kind, about, value) in found.items():
        lines += [f"# HELP lama:{name} {about}.", f"# TYPE lama:{name} {kind}"]
        values = value if isinstance(value, dict) else {"": value}
        lines += [f"lama:{name}{labels} {number}" for labels, number in values.items()]
    return "\n".join(lines) + "\n"


async def slots(service: Service, body: Body) -> list[dict[str, object]]:
    """The rows of the cache, including those that keep prefixes."""
    worker = service.backend.worker
    return [
        {
            "id": each.row,
            "n_ctx": service.backend.context,
            "is_processing": each.request is not None,
            "n_tokens": each.n_tokens,
        }
        for each in await worker.run(worker.engine.slots)
    ]


async def models(service: Service, body: Body) -> dict[str, object]:
    """The list of models: the model, also with each adapter. Their sizes are in `meta`."""
    data = []
    for backend in (service.backend, *service.adapted):
        config = backend.model.config
        meta = {
            "context": backend.context,
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "vocab_size": config.vocab_size,
            "chat": backend.template is not None,
            "internals": service.internals,
        }
        model = {"id": backend.name, "object": "model", "created": backend.created, "owned_by": "lama"}
        data.append({**model, "meta": meta})
    return {"object": "list", "data": data}
