"""Export a tokenizer as the files that Hugging Face's libraries read."""

import json
from pathlib import Path

from lama.errors import LamaError
from lama.files import checked, field, parse_json
from lama.tokenizers.base import TableTokenizer, Tokenizer
from lama.tokenizers.bpe import BytePairTokenizer, byte_alphabet, gpt2_files
from lama.tokenizers.chat_template import TEMPLATE_FILE
from lama.tokenizers.huggingface import END_OF_TEXT, GPT2, OWN_TOKENS, tokenizer_of_files
from lama.tokenizers.training import vocabulary_files


def with_template(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """The same tokenizer with a chat template among its files. Raises LamaError for one without files."""
    files = huggingface_files(tokenizer)
    if not files:
        got = f"got a {type(tokenizer).__name__}"
        raise LamaError(f"a tokenizer must be byte-pair encoding or WordPiece to keep a chat template; {got}")
    spec = tokenizer.to_json()
    of_class = field(spec, "class", str, "a tokenizer", None) if spec["kind"] == "huggingface" else GPT2
    files[Path(TEMPLATE_FILE).name] = source.encode()
    return tokenizer_of_files(files, Path("the tokenizer"), of_class)


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Each file's content; no files for characters or words, which byte-level BPE cannot express.

    tokenizer_config.json names the class of transformers that gives the same ids.
    """
    match tokenizer.to_json():
        case {"kind": "bytes"}:  # an alphabet without merges and special tokens
            return vocabulary_files(byte_alphabet(), [], [])
        case {"kind": "gpt2"}:
            return gpt2_files()
        case {"kind": "huggingface"} as spec if isinstance(tokenizer, TableTokenizer):
            files = {Path(name).name: content for name, content in tokenizer.files.items()}
            name = "tokenizer_config.json"
            config = checked(parse_json(files.get(name, b"{}"), name), dict, name)
            default = "PreTrainedTokenizerFast" if "tokenizer.json" in files else GPT2
            known: dict[str, object] = {"tokenizer_class": spec.get("class") or default}
            is_bpe = isinstance(tokenizer, BytePairTokenizer)
            if is_bpe and END_OF_TEXT.encode() not in tokenizer._bytes.values():
                known |= dict.fromkeys(OWN_TOKENS[GPT2])  # null, else transformers adds it
            return files | {name: json.dumps({**known, **config}, ensure_ascii=False, indent=1).encode()}
    return {}
