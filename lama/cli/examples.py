"""Two examples for every verb, the groups of `lama --help`, and what `lama` alone prints."""

FIVE = """\
lama is a transformer from scratch in tinygrad. Five things to do with it:

  lama chat
      talk with a small model
  lama generate -p "How can entropy be reversed?"
      continue a text
  lama train --corpus my-book.txt
      train a model on your own text
  lama attention -m lama-bpe "In the beginning God created the heaven" --out attention.html
      see which words each head looks at
  lama course
      learn how a transformer works, in notebooks

`lama help` lists all verbs, `lama help VERB` describes one, `lama doctor` checks the installation."""

GROUPS = {
    "use a model": "generate chat serve fill translate",
    "train": "train seq2seq bert classify tokenizer data",
    "change and measure a model": "fuse quantize export eval",
    "look inside": "attention lens patch ablate heads",
    "learn": "course experiment",
    "the installation": "doctor completion",
}
"""The verbs by group, in the order of `lama --help`."""

EXAMPLES = {
    "generate": (
        'lama generate -p "How can entropy be reversed?"',
        'lama generate -m smollm2 -p "Once upon a time" -n 200 --temperature 0.7',
    ),
    "chat": ("lama chat", "lama chat -m out/tuned --system 'Answer in one sentence.'"),
    "serve": ("lama serve", "lama serve -m smollm2 --port 8081 --rows 16"),
    "train": (
        "lama train --corpus my-book.txt --out out/mine",
        "lama train modern-char-cpu --corpus tinyshakespeare",
    ),
    "fuse": (
        "lama fuse -m smollm2 out/tuned --out out/fused",
        "lama fuse -m gpt2 my-adapter --out out/gpt2-mine",
    ),
    "seq2seq": ("lama seq2seq reverse --out out/reverse", "lama seq2seq check -m out/reverse -v"),
    "translate": (
        "lama translate -m out/reverse abcdefghijabcdef",
        "lama translate -m out/dates --beam 4 98-03-21",
    ),
    "bert": ("lama bert --out out/bert", "lama bert --corpus my-book.txt --steps 2000"),
    "fill": (
        'lama fill -m out/bert "In the [MASK] God created the heaven."',
        "lama fill -m google-bert/bert-base-uncased - < lines.txt",
    ),
    "classify": (
        "lama classify train shakespeare-milton --out out/authors",
        'lama classify predict -m out/authors "Of man\'s first disobedience"',
    ),
    "tokenizer": (
        "lama tokenizer my-book.txt 8000 --out out/tokenizer",
        "lama tokenizer 4000 --out out/kjv",
    ),
    "data": (
        "lama data books/ web.jsonl.zst --tokenizer gpt2 --out tokens",
        "lama data my-book.txt --tokenizer bytes --out tokens",
    ),
    "eval": (
        "lama eval -m lama-bpe --text LICENSE",
        "lama eval -m gpt2 --task lambada --data lambada_test.jsonl",
    ),
    "quantize": (
        "lama quantize -m smollm2 --to int8 --out out/small",
        "lama quantize -m lama-bpe --to int4 --out out/tiny",
    ),
    "export": (
        "lama export -m out/gpt --to hf exported",
        "lama export -m out/gpt --to gguf model.gguf --dtype int8",
    ),
    "attention": (
        'lama attention -m lama-bpe "In the beginning God created the heaven" --out attention.html',
        'lama attention -m lama-bpe "In the beginning God created the heaven" --layer 3 --head 4',
    ),
    "lens": (
        'lama lens -m lama-bpe "And the LORD said unto"',
        'lama lens -m lama-bpe "And the LORD said unto" --answer " Moses" --against " David" --out lens.png',
    ),
    "patch": (
        'lama patch -m lama-bpe "And Moses spake" "And David spake" --answer " unto" --against " of"',
        'lama patch -m lama-bpe "Moses spake" "David spake" --answer " unto" --against " of" --site z',
    ),
    "ablate": (
        'lama ablate -m lama-bpe "And Moses spake unto the LORD"',
        "lama ablate -m smollm2 --repeated 25 --mean --head 17.3",
    ),
    "heads": ("lama heads -m lama-bpe", "lama heads -m smollm2 --out heads.png"),
    "course": ("lama course", "lama course --out my-course --no-open"),
    "experiment": ("lama experiment order", "lama experiment grokking --full"),
    "doctor": ("lama doctor", "lama doctor --start -m smollm2"),
    "completion": (
        "lama completion bash > ~/.local/share/bash-completion/completions/lama",
        "lama completion zsh > ~/.zfunc/_lama",
    ),
}
