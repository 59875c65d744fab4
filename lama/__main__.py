"""The entry point of `lama`, `python -m lama`, gpt.py and transformer.py."""

import sys


def command(*verb: str) -> None:
    """Run the command line, with `verb` before its arguments, and exit with its code.

    Ctrl-C exits with 130 and no traceback, even during the imports: all of them are in this function.
    """
    code = 130
    try:
        import os
        import signal

        if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and sys.executable:
            # Arguments and file names are UTF-8.
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        from lama.cli import main

        code = main([*verb, *sys.argv[1:]])
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # only Python's own exit follows
    except KeyboardInterrupt:
        pass
    sys.exit(code)


if __name__ == "__main__":
    command()
