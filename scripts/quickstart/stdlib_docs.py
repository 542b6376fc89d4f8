"""Read the documentation strings of Python's standard library; shared by make_text.py and make_instructions.py.

The result depends on the Python that runs it (docstrings change between versions) and on nothing else: modules and
members are visited by name, no addresses or paths get through. The committed files were made with Python 3.11.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

PYTHON = "/usr/bin/python3"  # stands for this interpreter's place, which is the default of some arguments

# Named one by one, because importing everything has side effects (`antigravity` opens a browser, `this` prints).
MODULES = """
abc argparse array asyncio.base_events asyncio.events asyncio.locks asyncio.queues asyncio.runners asyncio.streams
asyncio.subprocess asyncio.tasks base64 bdb binascii bisect bz2 calendar cmath cmd code codecs codeop collections
collections.abc colorsys compileall concurrent.futures concurrent.futures.thread configparser contextlib contextvars
copy copyreg csv ctypes.util curses.ascii dataclasses datetime decimal difflib dis doctest email.charset
email.header email.headerregistry email.message email.parser email.policy email.utils enum filecmp fileinput fnmatch
fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser
http.client http.cookiejar http.cookies http.server imaplib importlib.metadata importlib.util inspect io ipaddress
itertools json json.decoder json.encoder keyword linecache locale logging logging.config logging.handlers lzma
mailbox marshal math mimetypes mmap multiprocessing.connection multiprocessing.managers multiprocessing.pool
multiprocessing.shared_memory netrc numbers operator os posixpath pathlib pdb pickle pickletools pkgutil platform
plistlib poplib pprint profile pstats py_compile pyclbr queue quopri random re reprlib rlcompleter runpy sched
secrets select selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics
string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap threading time timeit
tokenize trace traceback tracemalloc types typing unicodedata unittest.case unittest.mock unittest.suite
urllib.error urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser
wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree
xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib
zoneinfo
""".split()

# Types whose methods people ask about most; they live in `builtins`, which has no useful module text of its own.
BUILTIN_TYPES = """
bytes bytearray dict float frozenset int list memoryview object property range set slice str tuple type
""".split()


@dataclass(frozen=True)
class Argument:
    """One argument of a signature: its name, whether it may be left out, whether it must be passed by name, and the
    text of its default ("" if none)."""

    name: str
    optional: bool
    keyword_only: bool
    default: str


@dataclass(frozen=True)
class Entry:
    """One documented function, method or class of the standard library."""

    module: str
    name: str  # within the module: "copy" or "Fraction.limit_denominator"
    kind: str  # function | method | class
    signature: str  # "(src, dst, *, follow_symlinks=True)", without self; "" when Python does not know it
    arguments: tuple[Argument, ...]
    doc: str

    @property
    def full_name(self) -> str:
        """ "shutil.copy"; builtins go by their own name, as people write them."""
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"


def modules() -> list[ModuleType]:
    """The modules of `MODULES` that exist on this platform, in the order of that list."""
    found = []
    for name in MODULES:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError:  # e.g. curses on Windows
            continue
    return found


def clean(doc: str | None) -> str:
    """The docstring as paragraphs without trailing blanks; "" when it holds more than ASCII, or an object's address."""
    text = inspect.cleandoc(doc or "")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines()))
    return text.strip() if text.isascii() and " at 0x" not in text else ""


def entries() -> Iterator[Entry]:
    """Yield every documented public function, class and method once, module by module, names in order."""
    seen: set[int] = set()
    for module in modules():
        yield from _module_entries(module, seen)
    builtins = importlib.import_module("builtins")
    for name in BUILTIN_TYPES:
        yield from _members("builtins", name, getattr(builtins, name), seen)
    for name, value in sorted(vars(builtins).items()):
        if inspect.isbuiltin(value) and not name.startswith("_"):
            yield from _entry("builtins", name, "function", value, seen)


def _module_entries(module: ModuleType, seen: set[int]) -> Iterator[Entry]:
    label = "os.path" if module.__name__ == "posixpath" else module.__name__
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        if inspect.isroutine(value) and _belongs(value, module):
            yield from _entry(label, name, "function", value, seen)
        elif inspect.isclass(value) and _belongs(value, module):
            yield from _entry(label, name, "class", value, seen)
            yield from _members(label, name, value, seen)


def _members(module: str, class_name: str, cls: type, seen: set[int]) -> Iterator[Entry]:
    for name, raw in sorted(vars(cls).items()):
        value = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
        if not name.startswith("_") and inspect.isroutine(value):
            yield from _entry(module, f"{class_name}.{name}", "method", value, seen)


def _belongs(value: object, module: ModuleType) -> bool:
    home = getattr(value, "__module__", None)
    if home is None:
        return True
    # C accelerators call themselves _bisect, posix, _io ...; a re-export from another listed module is not ours.
    if home == module.__name__ or home.lstrip("_") == module.__name__:
        return True
    return home not in MODULES and home != "builtins"


def _entry(module: str, name: str, kind: str, value: object, seen: set[int]) -> Iterator[Entry]:
    doc = clean(getattr(value, "__doc__", None))
    if len(doc) < 20 or id(value) in seen:
        return
    seen.add(id(value))
    signature, arguments = _signature(value, kind)
    signature = signature.replace(sys.executable, PYTHON)
    if not signature:
        head, rest = _signature_in_doc(doc, name.rsplit(".", 1)[-1])
        signature, doc = head, rest or doc
    yield Entry(module, name, kind, signature, arguments, doc)


def _signature(value: object, kind: str) -> tuple[str, tuple[Argument, ...]]:
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (ValueError, TypeError):
        return "", ()
    if kind == "method" and parameters and parameters[0].name in ("self", "cls", "type"):
        parameters = parameters[1:]
    plain = [p.replace(annotation=p.empty) for p in parameters]
    text = str(inspect.Signature(plain))
    if " at 0x" in text or "<" in text or not text.isascii():  # defaults without a literal: objects, sentinels
        return "", ()
    empty = inspect.Parameter.empty
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = tuple(
        Argument(
            name=p.name,
            optional=p.default is not empty,
            keyword_only=p.kind is p.KEYWORD_ONLY,
            default="" if p.default is empty else repr(p.default),
        )
        for p in plain
        if p.kind not in starred
    )
    return text, arguments


def _signature_in_doc(doc: str, name: str) -> tuple[str, str]:
    """Old C docstrings open with "name(a[, b]) -> int": split that line off."""
    match = re.match(rf"(?:\w+\.)*{re.escape(name)}(\([^\n]*\))[^\n]*\n+(?=\S)", doc)
    return (match.group(1), doc[match.end() :].strip()) if match else ("", "")
