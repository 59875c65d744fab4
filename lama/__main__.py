"""The entry point of `lama`, `python -m lama`, gpt.py and transformer.py."""

import sys


def command(*verb: str) -> None:
    """Run the command line, its arguments after `verb`, and end the process with its exit code.

    Ctrl-C gives 130 without a traceback, also during imports: these are all in here.
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
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python only ends from here on
    except KeyboardInterrupt:
        pass
    sys.exit(code)


if __name__ == "__main__":
    command()
