"""Export a tokenizer as the files that Hugging Face's libraries read."""

import json
from pathlib import Path

from lama.files import checked, parse_json
from lama.tokenizers.base import TableTokenizer, Tokenizer
from lama.tokenizers.bpe import BytePairTokenizer, byte_alphabet, gpt2_files
from lama.tokenizers.huggingface import END_OF_TEXT, GPT2, OWN_TOKENS
from lama.tokenizers.training import vocabulary_files


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
