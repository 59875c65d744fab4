"""Any tokenizer that is made of bytes, as the files that Hugging Face's libraries read."""

import json
from pathlib import Path

from lama.files import parse_json
from lama.tokenizers.base import TableTokenizer, Tokenizer
from lama.tokenizers.bpe import BytePairTokenizer, byte_alphabet, gpt2_files
from lama.tokenizers.huggingface import END_OF_TEXT, GPT2, OWN_TOKENS
from lama.tokenizers.training import files_of


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The content of each file; none for a tokenizer of characters or words, which byte-level BPE cannot express.

    tokenizer_config.json names the class of transformers with which the ids are the same.
    """
    match tokenizer.to_json():
        case {"kind": "bytes"}:  # an alphabet, and neither merges nor special tokens
            return files_of(byte_alphabet(), [], [])
        case {"kind": "gpt2"}:
            return gpt2_files()
        case {"kind": "huggingface"} as spec if isinstance(tokenizer, TableTokenizer):
            files = {Path(name).name: content for name, content in tokenizer.files.items()}
            config = parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
            known = {"tokenizer_class": spec.get("class") or ("PreTrainedTokenizerFast" if "tokenizer.json" in files else GPT2)}
            if isinstance(tokenizer, BytePairTokenizer) and END_OF_TEXT.encode() not in tokenizer._bytes.values():
                # null, or else transformers adds it
                known |= dict.fromkeys(OWN_TOKENS[GPT2])
            return files | {"tokenizer_config.json": json.dumps(known | config, ensure_ascii=False, indent=1).encode()}
    return {}
