"""The command `python transformer.py -v`, which is `lama train`: train a small GPT from scratch."""

from lama.__main__ import command

if __name__ == "__main__":
    command("train")
