"""Real prompts for the demo: signatures with docstrings from the installed standard library."""

import importlib
import inspect
import random
import warnings

MODULES = """
argparse ast asyncio.tasks base64 bisect calendar cmd codecs collections colorsys configparser contextlib copy
csv datetime decimal difflib dis email.utils enum fileinput fnmatch fractions functools getpass gettext glob
gzip heapq hmac html http.client imaplib inspect ipaddress json keyword linecache locale logging mailbox
mimetypes netrc ntpath numbers operator os os.path pathlib pickletools pkgutil platform plistlib posixpath
pprint profile pstats queue quopri random re reprlib sched secrets shelve shlex shutil smtplib socket
statistics string subprocess tarfile tempfile textwrap threading timeit token tokenize traceback types typing
unittest.case urllib.parse uuid warnings wave weakref xml.dom.minidom zipfile
""".split()  # noqa: SIM905 - a list of quoted names reads worse
MAX_CHARS = 260  # the starter model takes 256 tokens, prompt and answer together


def standard_library_prompts(count: int, *, seed: int = 1) -> list[str]:
    """`count` different prompts, each a def line and its docstring, without a trailing newline."""
    found: dict[str, None] = {}
    for name in MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(name)
        for _, function in inspect.getmembers(module, inspect.isfunction):
            prompt = _prompt(function)
            if prompt is not None and len(prompt) <= MAX_CHARS:
                found[prompt] = None
    prompts = list(found)
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def _prompt(function: object) -> str | None:
    doc = inspect.getdoc(function)
    if not doc or '"""' in doc or not callable(function):
        return None
    try:
        signature = str(inspect.signature(function))
    except (TypeError, ValueError):
        return None
    if " at 0x" in signature:
        return None
    lines = doc.strip().splitlines()
    text = "\n".join(f"    {line}".rstrip() for line in lines)[4:]
    end = "\n    " if len(lines) > 1 else ""
    return f'def {function.__name__}{signature}:\n    """{text}{end}"""'  # type: ignore[attr-defined]  # a function
