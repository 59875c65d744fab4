"""New and resumed runs of `lama train`, whatever the model."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lama.atomic import unwritable, write_atomically
from lama.checkpoints import find, is_adapter, load_causal, load_kind, named_tokenizer, open_checkpoint
from lama.data import Corpus, open_corpus, open_tokens
from lama.data.inputs import check_tokens
from lama.data.tokens import Progress, TokenFiles, link_tokens
from lama.errors import LamaError, UsageError, note, quoted
from lama.files import quoted_path
from lama.layers import initialise_by_width
from lama.models.adapters import add_adapter, matching
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import dtype_of, refuse_quantized, without_rounding
from lama.models.registry import n_parameters
from lama.runtime.device import open_device
from lama.tokenizers import CharacterTokenizer, Tokenizer, train_bpe
from lama.tokenizers.training import END_OF_TEXT, check_vocabulary
from lama.training.budget import check_adapter_memory, check_memory
from lama.training.chat import (
    CONTEXT,
    DEFAULTS,
    add_end_token,
    check_chat,
    new_conversations,
    scheduled,
    templated,
)
from lama.training.classify import ClassifierSession, new_classifier
from lama.training.corpus import (
    check_lengths,
    new_tokens,
    reopened_tokens,
    tokenized_corpus,
    tokenized_folder,
)
from lama.training.folder import RunFolder, SilentFolder, read_training
from lama.training.loop import check_devices, check_processes
from lama.training.masked import BertSession, new_bert
from lama.training.pairs import PairSession, new_pairs
from lama.training.preferences import PreferenceRun
from lama.training.processes import Processes
from lama.training.recording import what_to_record
from lama.training.rows import read_rows
from lama.training.run import Run
from lama.training.session import Parts, Session
from lama.training.settings import RunConfig, checked_names, run_config, settings_of
from lama.training.settings.base import CorpusSettings, Settings, differences
from lama.training.settings.gpt import (
    DPO_LORA_RATE,
    DPO_RATE,
    FINE_TUNING_RATE,
    LORA_CONTEXT,
    LORA_RATE,
    MODEL_SETTINGS,
)
from lama.training.settings.scale import Scale, scaled

OWN = "the model's"  # the setting `tokenizer` if the model brings its own

NEW: dict[str, Callable[[Parts], Session]] = {
    "bert": new_bert,
    "seq2seq": new_pairs,
    "classifier": new_classifier,
}
SESSIONS: dict[str, tuple[str, Callable[..., Session]]] = {
    "gpt": ("gpt", Run),
    "dpo": ("gpt", PreferenceRun),
    "bert": ("bert", BertSession),
    "seq2seq": ("transformer", PairSession),
    "classifier": ("classifier", ClassifierSession),
}
"""For each `model` of the settings, and for DPO: the kind of its checkpoints, and its session's class."""


def new_session(
    folder: RunFolder,
    settings: Settings,
    command: str,
    scale: Scale | None = None,
    devices: Sequence[str] = (),
    progress: Progress = iter,
    team: Processes | None = None,
) -> Session:
    """Prepare a run of the model that `settings` name. Raises LamaError; the folder is then unchanged.

    `settings` are only those that were given. For the others, a GPT's `initial` model changes the defaults,
    and `scale` chooses its shape and training.
    """
    parts = Parts(folder, None, devices, {"command": command}, progress, team)
    if (model := str(settings.get("model", "gpt"))) == "gpt":
        return new_gpt(parts, settings, scale)
    parts.config = settings_of(settings)
    check_devices(parts.config, devices)
    check_processes(parts.config, team)
    return NEW[model](parts)


def resumed_run(
    folder: RunFolder, changes: Settings, devices: Sequence[str] = (), team: Processes | None = None
) -> Session:
    """Resume the run in `folder` from its last checkpoint, with the same bits as an uninterrupted run.

    `changes` may only be settings of reports. Raises LamaError for other changes, for changed data, and if
    there is no checkpoint.
    """
    config = settings_of({**folder.settings(), **changes})
    checkpoint = folder.last_checkpoint()
    notes = read_training(checkpoint)
    began = settings_of(checked_names(notes["config"], str(checkpoint / "training.json")))
    if changed := differences(asdict(began), asdict(config)):
        another = f"start from this run's model: --from {folder.path} --out DIR"
        raise UsageError(
            f"a resumed run must have the settings it began with; got {'; '.join(changed)}. "
            f"For another run, {another if isinstance(config, RunConfig) else 'choose another --out'}"
        )
    if (shares := folder.devices()) != (given := max(1, len(devices))):
        got = f"got {given}. Give --devices {shares}"
        raise UsageError(f"a resumed run must have the number of devices it began with; {got}")
    kind, new = SESSIONS["dpo" if getattr(config, "dpo", 0) else config.model]
    check_processes(config, team)
    if config.exchange != "float32" and (then := notes.get("processes", 1)) != (team.size if team else 1):
        got = f"got {team.size if team else 1}. Give --processes {then}"
        raise UsageError(f"with exchange={config.exchange} a run must keep its number of processes; {got}")
    parts = Parts(folder, config, devices, team=team)
    adapted = config if isinstance(config, RunConfig) and config.lora else None
    if adapted is not None:
        parts.model, tokenizer = load_initial(adapted)
        parts.tokenizer = templated(tokenizer, adapted.template)
    else:
        parts.model, parts.tokenizer = load_kind(kind, checkpoint)
    if isinstance(config, CorpusSettings):
        tokens = reopened_tokens(parts, checkpoint)
        if adapted is not None and adapted.chat:
            add_end_token(parts.model, parts.tokenizer, tokens)
        session = new(parts, tokens)
    else:
        session = new(parts, read_rows(folder.data))
    folder.clean()
    session.restore(checkpoint)
    if notes.get("data") != session.digest:
        got = f"got other data in {folder.data} than at {checkpoint.name}"
        raise LamaError(f"a resumed run must read the data it began with; {got}")
    session.recall(notes)
    return session


def lead(team: Processes, session: Session | None) -> None:
    """Send the other processes of a team this session, for `followed`; None if there is nothing to do."""
    team.stage = "end" if session is None else "train"
    if session is None:
        team.share(None)
        return
    steps = [trainer.step for trainer in session.trainers]
    folder = RunFolder(session.folder.path.absolute(), session.folder.command)
    parts = replace(Parts(folder, session.config, (), session.about), tokenizer=session.tokenizer)
    team.share((replace(parts, model=session.model), session.digest, steps, session.evaluated, session.best))
    share_data(team, folder)
    team.gather(session.digest)


def followed(team: Processes) -> Session | None:
    """The session of a process that does not lead: it only computes. Raises LamaError for other data."""
    open_device()  # before the first process's tensors arrive: tinygrad would look for a compiler on PATH
    given: tuple[Parts, str, list[int], int, float] | None = team.share()
    if given is None:
        return None
    parts, digest, steps, evaluated, best = given
    share_data(team, parts.folder)
    folder = SilentFolder(parts.folder.path, parts.folder.command)
    is_text = isinstance(parts.config, CorpusSettings)
    data = open_tokens(folder.data, verify=True) if is_text else read_rows(folder.data)
    new = SESSIONS["dpo" if getattr(parts.config, "dpo", 0) else parts.config.model][1]
    session = new(replace(parts, folder=folder, team=team), data)
    if session.digest != digest:
        got = f"got data in {folder.data} that differs from the first process's. Remove it there"
        raise LamaError(f"all processes must read the same data; {got}")
    team.gather(digest)
    for trainer, step in zip(session.trainers, steps, strict=True):
        trainer.step = step
    session.evaluated, session.best = evaluated, best
    return session


def share_data(team: Processes, folder: RunFolder) -> None:
    """Copy the run's data to hosts that have none. Raises LamaError for hosts that have other data."""

    def write(name: str, content: bytes) -> None:
        try:
            folder.data.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder.data, error) from error
        write_atomically(folder.data / name, content)

    team.share_files(folder.data, write)


def new_gpt(parts: Parts, settings: Settings, scale: Scale | None) -> Run:
    """Prepare a GPT's run: corpus, tokenizer, tokens on disk, model."""
    given, folder = dict(settings), parts.folder
    model: GPT | None = None
    tokenizer: Tokenizer | None = None
    first = run_config(given)  # all values are checked before a model is read
    check_chat(first)
    check_mixture(first)
    if first.initial:
        if scale is not None:
            got = f"got {scale} and --from {first.initial}"
            raise UsageError(f"a size cannot be chosen for a model to start from; {got}")
        model, tokenizer, given = start_from(first, given, folder)
    config = run_config(given)
    corpus: Corpus | None = None
    ready: TokenFiles | None = None
    if not config.chat and (tokenized := tokenized_folder(config)):
        ready, tokenizer = tokenized_corpus(tokenized, tokenizer or chosen_tokenizer(given))
        given |= {"tokenizer": OWN}
        config = run_config(given)
    else:
        corpus = open_corpus(config.chat or config.corpus, folder.path, read=not config.chat)
        tokenizer = tokenizer or make_tokenizer(config.tokenizer, corpus)
        if config.chat:
            tokenizer = templated(tokenizer, config.template)
    if scale is not None:
        config = run_config({**given, **scaled(scale, config, given, tokenizer.vocab_size)})
    try:
        shape = model.config if model else model_config(config, tokenizer.vocab_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_devices(config, parts.devices)
    check_processes(config, parts.team)
    if config.lora and parts.devices[1:]:
        raise UsageError(f"an adapter must be trained on one device; got {len(parts.devices)}")
    team = parts.team
    sharing = team.hosts.count(team.hosts[team.rank]) if team else 1
    if model is not None and config.lora:
        check_adapter_memory(config, model, sharing)
    else:
        check_memory(config, shape, team.size if team else 1, sharing)
    what_to_record(config, tokenizer, shape)
    parts.config, parts.tokenizer = config, tokenizer
    with folder.beginning(config, str(parts.about["command"])) as data:
        if corpus is None:
            assert ready is not None
            tokens = ready
            check_lengths(tokens, config)
            link_tokens(tokens, data)
        else:
            tokens = (new_conversations if config.chat else new_tokens)(parts, corpus, data)
        if tokenizer.vocab_size > shape.vocab_size:
            for part in (tokens.train, tokens.validation):
                check_tokens(tokenizer, [int(part.max())], shape.vocab_size)
        parts.model = model or new_model(config, shape)
    tokens = open_tokens(folder.data)
    if config.chat:
        add_end_token(parts.model, tokenizer, tokens)
        parts.config = scheduled(config, settings, tokens)
        folder.write_settings(parts.config, str(parts.about["command"]))
    run = (PreferenceRun if config.dpo else Run)(parts, tokens)
    run.corpus = None if config.chat else corpus
    return run


def start_from(
    first: RunConfig, given: Settings, folder: RunFolder
) -> tuple[GPT, Tokenizer, dict[str, object]]:
    """The model to start from, its tokenizer, and the settings with those of the model. Raises LamaError."""
    source, out = Path(os.path.realpath(first.initial)), Path(os.path.realpath(folder.path))
    if out in (source, *source.parents):
        got = f"got {quoted_path(folder.path)} and --from {first.initial}"
        raise UsageError(f"--out must not be the folder of the model to start from; {got}")
    model, tokenizer = load_initial(first)
    most = model.config.context_length
    defaults: dict[str, object] = {"learning_rate": FINE_TUNING_RATE}
    if first.lora:
        defaults = {"learning_rate": LORA_RATE, "weight_decay": 0.0}
        defaults["context_length"] = min(LORA_CONTEXT, most)
    if first.chat:
        defaults |= {**DEFAULTS, "context_length": min(CONTEXT, most)}
    if first.dpo:
        defaults["learning_rate"] = DPO_LORA_RATE if first.lora else DPO_RATE
    return model, tokenizer, _of_the_model({**defaults, **given}, model.config)


def load_initial(config: RunConfig) -> tuple[GPT, Tokenizer]:
    """The model to start from and its tokenizer, with a new adapter if one is to be trained.

    An adapter leaves the weights in their dtype; quantised ones multiply activations without rounding these.
    Raises LamaError.
    """
    if not config.lora:
        model, tokenizer = load_causal(config.initial, dtype="float32")
        refuse_quantized(model, "to be trained")
        note_widened(config.initial, model)
        return model, tokenizer
    if is_adapter(Path(config.initial)):
        got = f"got the adapter {quoted_path(config.initial)}. Fold it into its model first with lama fuse"
        raise UsageError(f"lora needs a model to adapt; {got}")
    dtype = None if config.dtype == "file" else config.dtype
    model, tokenizer = load_causal(config.initial, dtype=dtype, in_rows=True)
    if without_rounding(model) and config.precision != "float32":
        got = f"got precision={config.precision} for {dtype_of(model)}"
        raise UsageError(f"precision must be float32 with quantised weights; {got}")
    names = matching(model, config.lora_on)
    add_adapter(model, names, config.lora, config.lora_scale, config.seed, config.dora)
    return model, tokenizer


def note_widened(initial: str, model: GPT) -> None:
    """Print a note if the weights of a quantised file are trained in float32."""
    if is_adapter(Path(initial)):
        return
    tensors = open_checkpoint(find(initial).path).tensors().values()
    if types := ", ".join(sorted({tensor.stored for tensor in tensors} - {""})):
        size = 4 * n_parameters(model)
        note(f"{initial} has {types} weights, which are converted to float32 for training: {size:,} bytes")


def check_mixture(config: RunConfig) -> None:
    """Raise UsageError for shares that are not numbers above 0."""
    for text in config.mixture:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UsageError(f"mixture must be numbers above 0; got {quoted(text)}")


def chosen_tokenizer(given: Settings) -> Tokenizer | None:
    """The tokenizer that the setting names, if it needs no text; None for that of the tokenised corpus."""
    name = str(given.get("tokenizer", OWN))
    return None if name == OWN else make_tokenizer(name)


def make_tokenizer(name: str, corpus: Corpus | None = None) -> Tokenizer:
    """The tokenizer that a setting names; bpe:SIZE is trained on the corpus. Raises LamaError."""
    if name.startswith("bpe:"):
        try:
            size = int(name.removeprefix("bpe:"))
        except ValueError:
            raise UsageError(f"tokenizer must be bpe:SIZE, such as bpe:2000; got {quoted(name)}") from None
        check_vocabulary(size, [END_OF_TEXT])
        if corpus is not None:
            return train_bpe(corpus.pieces(), size)
    if name == "character" and corpus is not None:
        return CharacterTokenizer(corpus.characters())
    if name == "character" or name.startswith("bpe:"):
        raise UsageError(f"a tokenised corpus must keep its tokenizer; got {name}. Leave it out")
    if name not in ("bytes", "gpt2") and not os.path.isdir(name):
        kinds = "bytes, character, gpt2, bpe:SIZE or a folder"
        raise UsageError(f"tokenizer must be {kinds}; got {quoted(name)}")
    return named_tokenizer(name)


def model_config(config: RunConfig, vocab_size: int) -> GPTConfig:
    """The shape that the settings describe. Raises ValueError."""
    return GPTConfig(vocab_size, **{name: getattr(config, name) for name in MODEL_SETTINGS})


def new_model(config: RunConfig, shape: GPTConfig) -> GPT:
    """A model with the initial weights that the settings name."""
    if config.initial_weights == "gpt2":
        return GPT(shape, config.seed)
    model = GPT(shape, seed=None)
    initialise_by_width(model, config.seed)
    return model


def _of_the_model(given: Settings, shape: GPTConfig) -> dict[str, object]:
    """The settings with the shape of the initial model. Raises UsageError for another shape."""
    if given.get("tokenizer", OWN) != OWN:
        got = f"got --tokenizer {quoted(given['tokenizer'], plain=True)}. Leave it out"
        raise UsageError(f"the tokenizer must be the model's own with --from; {got}")
    own = {name: getattr(shape, name) for name in MODEL_SETTINGS}
    for name, value in own.items():
        wanted = given.get(name, value)
        if name == "context_length":
            if wanted > value:
                raise UsageError(f"context_length must be at most the model's, {value}; got {wanted}")
        elif wanted != value:
            got = f"got {wanted}. Leave it out"
            raise UsageError(f"{name} must be the model's own with --from, {value}; {got}")
    return {**own, **given, "tokenizer": OWN}
