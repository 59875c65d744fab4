"""The command `python gpt.py -p "How can entropy be reversed?"`, which is `lama generate`."""

from lama.__main__ import command

if __name__ == "__main__":
    command("generate")
