"""Ways to damage files and to plant in them what must never run. What is drawn comes from the ``Random`` that is handed in.

What a planted name would do if it ran: make a file called ``ran`` in the working directory, which ``fuzz.watch`` looks for.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

EDGES = (
    *(0, 1, 2, 3, 7, 8, 9, 127, 128, 255, 256, 2**15 - 1, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
MARK = "ran"
CANARY = "lustral_canary"  # a module beside the specimens
CODE_NAMES = (
    *(
        "evil.py:f",
        "./evil.py:f",
        "evil.py:f\n",
        " evil.py:f",
        "x\nevil.py:f",
        "evil.py:f\r",
        "evil.py\0:f",
        "\u202eevil.py:f",
    ),
    *("conditioned:x\ny@evil.py:f", "conditioned:x@evil.py:f", "conditioned:a@conditioned:b@evil.py:f", "y@evil.py:f"),
    *(
        "conditioned:stem.0@small_cnn:width=2\n@evil.py:f",
        "small_cnn:width=2\nevil.py:f",
        f"{CANARY}.py:f",
        f"{CANARY}:f",
    ),
    *(
        "timm:hf-hub:some/one",
        "timm:local-dir:.",
        "torchvision:evil.py:f",
        "transformers:evil.py:f",
        "conditioned:" * 40,
    ),
    *(
        "small_cnn:width=1000000",
        "wrn16:width=99999",
        "preact_resnet18:width=2:depth=9",
        "timm:../evil",
        "vgg:" + "x" * 5000,
    ),
)
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3.5,
        -0.0,
        10**9,
        2**31,
        2**63,
        2**64,
        -(2**64),
        10**30,
        1e308,
        1e-320,
        float("nan"),
    ),
    *(
        float("inf"),
        "",
        "x",
        "0",
        "\u202e",
        "\x1b[31m",
        "[/red]",
        "a\nb",
        "\0",
        "/",
        "../..",
        "~",
        "digits",
        "/dev/zero",
        "x" * 5000,
    ),
    *("torchvision:CIFAR10", "http://127.0.0.1:9/x", "\ud800"),
    *([], {}, [0], [[[]]], {"a": 1}, [10**9] * 3, [3, 10**6, 10**6], ["a", "a"], list(range(3000)), {"": None}),
    *CODE_NAMES,
)


# Bytes


def near(length: int, draw: Random) -> int:
    """Draw a place in ``length`` bytes: near the beginning and the end more often than elsewhere."""
    where = draw.random()
    if where < 0.4:
        return draw.randrange(min(length, 600))
    if where < 0.6:
        return length - 1 - draw.randrange(min(length, 300))
    return draw.randrange(length)


def _flip(content: bytearray, start: int, draw: Random) -> None:
    content[start] ^= 1 << draw.randrange(8)


def _overwrite(content: bytearray, start: int, draw: Random) -> None:
    run = bytes([draw.choice((0, 255, 127, 128, ord("9"), draw.randrange(256)))]) * draw.randrange(1, 9)
    content[start : start + len(run)] = run


def _delete(content: bytearray, start: int, draw: Random) -> None:
    del content[start : start + draw.choice((1, 2, 4, 8, 64, 1000))]


def _splice(content: bytearray, start: int, draw: Random) -> None:
    length, other = draw.choice((1, 4, 8, 64, 500)), draw.randrange(len(content))
    content[start : start + length] = content[other : other + length]


def _repeat(content: bytearray, start: int, draw: Random) -> None:
    content[start:start] = content[start : start + draw.choice((1, 8, 64, 400))] * draw.choice((1, 1, 2, 50))


def _insert(content: bytearray, start: int, draw: Random) -> None:
    """Put random bytes among the rest, or a call as pickles write it."""
    call = _call(*draw.choice(_EVIL), form=draw.randrange(9))
    content[start:start] = draw.choice((draw.randbytes(draw.choice((1, 2, 4, 16, 200))), call))


def _cut(content: bytearray, start: int, draw: Random) -> None:
    del content[start + 1 :]


def _number(content: bytearray, start: int, draw: Random) -> None:
    """Put a number that overflows, or one beside what is there, into a field of 1 to 8 bytes."""
    form = draw.choice(("<H", "<I", "<Q", ">H", ">I", ">Q", "B"))
    size = struct.calcsize(form)
    old = int.from_bytes(content[start : start + size], "little" if form[0] == "<" else "big")
    number = draw.choice((draw.choice(EDGES), old + 1, old - 1, 2 * old, -old)) % 2 ** (8 * size)
    content[start : start + size] = struct.pack(form, number)


def _exchange_word(content: bytearray, start: int, draw: Random) -> None:
    """Put another number in place of one that is written in digits."""
    found = [*re.finditer(rb"[0-9]+", bytes(content[start : start + 2000]))]
    if found:
        chosen = draw.choice(found)
        digits = str(draw.choice((*EDGES, 10**30, -1))).encode()
        content[start + chosen.start() : start + chosen.end()] = digits


_BYTES = (_flip, _flip, _overwrite, _delete, _splice, _repeat, _insert, _cut, _number, _number, _number, _exchange_word)


def damage_bytes(content: bytes, draw: Random) -> bytes:
    """Flip, overwrite, delete, exchange, repeat, insert, cut, or put a number that overflows; once to four times."""
    changed = bytearray(content or b"\0")
    for _ in range(draw.randrange(1, 5)):
        draw.choice(_BYTES)(changed, near(len(changed), draw), draw)
        if not changed:
            return b""
    return bytes(changed)


# JSON


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value inside."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def edit_value(value: Any, draw: Random, odd: Sequence[Any] = ODD) -> Any:
    """Return plain data with odd values in place of some, some taken away, copied elsewhere or under another name."""
    changed = copy.deepcopy(value)
    for _ in range(draw.randrange(1, 4)):
        found = list(places(changed))
        if not found:
            return copy.deepcopy(draw.choice(odd))
        *outer, last = draw.choice(found)
        inside = changed
        for key in outer:
            inside = inside[key]
        how = draw.randrange(8)
        if how == 0:
            del inside[last]
        elif how == 1:
            *others, other = draw.choice(found)
            source = changed
            for key in others:
                source = source[key]
            inside[last] = copy.deepcopy(source[other])
        elif how == 2 and isinstance(inside, dict):
            inside[str(draw.choice(odd))[:6000]] = inside.pop(last)
        elif how == 3 and type(inside[last]) in (int, float):
            inside[last] = draw.choice((inside[last] + 1, inside[last] - 1, -inside[last], inside[last] * 1000))
        else:
            inside[last] = copy.deepcopy(draw.choice(odd))
    return changed


def json_text(value: Any, draw: Random) -> bytes:
    """Return plain data as JSON text, now and then one that a reader chokes on."""
    try:
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        text = b"null"
    how = draw.randrange(30)
    if how == 0:
        text = text.replace(b":", b":" + b"[" * draw.choice((70, 3000, 100_000)), 1)
    elif how == 1:
        text = b'{"a":' * 50_000 + text
    elif how == 2:
        text = text.replace(b"1", b"1" * draw.choice((30, 5000)), 1)
    elif how == 3:
        text = text[:-1] + b"," + text[1:]  # every key twice
    elif how == 4:
        text = draw.choice((b"\xff\xfe", b"\xef\xbb\xbf", b" " * 100_000)) + text
    elif how == 5:
        text = damage_bytes(text, draw)
    return text


def edit_json(text: bytes, draw: Random, odd: Sequence[Any] = ODD) -> bytes:
    """Return JSON with other values, or damaged."""
    return json_text(edit_value(json.loads(text), draw, odd), draw)


# safetensors


def edit_safetensors(content: bytes, draw: Random, odd: Sequence[Any] = ODD) -> bytes:
    """Edit the header, its length, or any bytes."""
    (length,) = struct.unpack_from("<Q", content)
    header, body = content[8 : 8 + length], content[8 + length :]
    how = draw.randrange(10)
    if how < 3:
        return damage_bytes(content, draw)
    if how == 3:
        return struct.pack("<Q", draw.choice(EDGES)) + content[8:]
    value = json.loads(header)
    if how == 4 and isinstance(value.get("__metadata__"), dict):
        value["__metadata__"]["arch"] = draw.choice(CODE_NAMES)
    elif how == 5:
        name = draw.choice([key for key in value if key != "__metadata__"])
        value[name]["shape"] = draw.choice(
            ([10**7, 0], [0] * 3, [2**62, 0, 2], [-1], [], [1] * 70, [2**32, 2**32], [1.5])
        )
        if draw.random() < 0.5:
            value[name]["data_offsets"] = [0, 0]
    elif how == 6:  # many tensors
        value |= {f"x{number}": {"dtype": "F32", "shape": [0, 9], "data_offsets": [0, 0]} for number in range(3000)}
    else:
        value = edit_value(value, draw, odd)
    text = json_text(value, draw)
    return struct.pack("<Q", len(text)) + text + body


# Pickles


def _call(module: str, name: str, *arguments: Any, form: int = 0) -> bytes:
    """Return opcodes that push the result of a call, in one of the ways that pickles have for it."""
    packed = pickle.dumps(arguments, 2)[2:-1]
    single = pickle.dumps(arguments[0] if arguments else None, 2)[2:-1]
    where = f"{module}\n{name}\n".encode()
    return (
        b"c" + where + packed + b"R",
        b"(" + single + b"i" + where,  # INST
        b"(c" + where + single + b"o",  # OBJ
        b"c" + where + packed + b"\x81",  # NEWOBJ
        b"c" + where + packed + b"}\x92",  # NEWOBJ_EX
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93"
        + packed
        + b"R",
        b"ccopyreg\n_reconstructor\n(c" + where + b"cbuiltins\nobject\nNtR" + packed + b"b",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(c" + where + b"c" + where + packed + b"NtR",
        b"c" + where + b"c" + where + packed + b"R" + packed + b"b0" + b"N",  # its result gets a state
    )[form]


_TOUCH = f"open({MARK!r}, 'w').close()"
_EVIL: tuple[tuple[Any, ...], ...] = (
    ("os", "system", f"touch {MARK}"),
    ("posix", "system", f"touch {MARK}"),
    ("builtins", "exec", _TOUCH),
    ("__builtin__", "eval", _TOUCH),
    ("builtins", "open", MARK, "w"),
    ("io", "FileIO", MARK, "w"),
    ("builtins", "__import__", CANARY),
    ("importlib", "import_module", CANARY),
    (CANARY, "f"),
    (f"{CANARY}.sub", "f"),
    ("runpy", "run_path", "evil.py"),
    ("subprocess", "Popen", ["touch", MARK]),
    ("os", "mkdir", MARK),
    ("pathlib", "Path", "/etc", "passwd"),
    ("torch", "load", "evil.pt"),
    ("torch.serialization", "load", "evil.pt"),
    ("torch.hub", "load_state_dict_from_url", "http://127.0.0.1:9/x"),
    ("numpy", "load", "evil.npy", None, True),
    ("numpy", "fromfile", "/dev/zero"),
    ("numpy.core.multiarray", "_reconstruct", "x", (10**10,), b"b"),
    ("numpy._core.numeric", "_frombuffer", b"", "O", (1,), "C"),
    ("numpy", "dtype", "O", False, True),
    ("numpy", "dtype", "V4000000000", False, True),
    ("ctypes", "CDLL", "libc.so.6"),
    ("socket", "create_connection", ("127.0.0.1", 9)),
    ("builtins", "getattr", "x", "format"),
    ("operator", "methodcaller", "system", f"touch {MARK}"),
    ("builtins", "bytearray", 6 * 10**9),
    ("builtins", "bytes", 6 * 10**9),
    ("builtins", "range", 10**12),
    ("builtins", "complex", "x" * 10**5),
    ("torch", "Tensor", 10**9, 10),
    ("torch", "zeros", 10**10),
    ("torch", "Size", (10**10, 10**10)),
    ("torch._utils", "_rebuild_tensor_v2", None, 0, (10**9,), (1,), False, None),
    ("torch._utils", "_rebuild_sparse_tensor", 0, ()),
    ("torch.jit", "load", "evil.pt"),
    ("_codecs", "encode", "x", "rot13"),
    ("codecs", "decode", zlib.compress(b"\0" * 10**6), "zlib"),
    ("collections", "OrderedDict", [["a", "b"]] * 3),
    ("collections", "Counter", {"a": 10**9}),
    ("collections", "defaultdict", "x"),
    ("argparse", "Namespace", {"a": 1}),
    ("decimal", "Decimal", "1e999999999"),
    ("fractions", "Fraction", "1" * 4000),
    ("datetime", "datetime", b"\0" * 10),
    ("uuid", "UUID", "x"),
)
_LOOSE = (
    b"(",
    b"0",
    b"1",
    b"2",
    b"N",
    b"}",
    b"]",
    b")",
    b"\x8f",
    b"t",
    b"d",
    b"l",
    b"e",
    b"u",
    b"a",
    b"s",
    b"b",
    b"R",
    b"\x94",
    b"Q",
)


def planted_pickle(draw: Random) -> bytes:
    """Return a pickle that does nothing but what it must not."""
    form = draw.randrange(9)
    call = _call(*draw.choice(_EVIL), form=form)
    if draw.random() < 0.5:
        call = b"}" + pickle.dumps("weight", 2)[2:-1] + call + b"s"
    return b"\x80" + bytes([draw.choice((2, 3, 4, 5))]) + call + b"."


def planted_pickle_files(draw: Random) -> bytes:
    """Return what a file that is a bare pickle would plant, in text or in binary opcodes."""
    return draw.choice(
        (
            planted_pickle(draw),
            b"cos\nsystem\n(S'touch ran'\ntR.",
            b"(S'touch ran'\nios\nsystem\n.",
            b"\x80\x02\x82\x01.",
        )
    )


def _opcodes(content: bytes, start: int) -> tuple[list[tuple[str, Any, bytes]], int]:
    """Return the opcodes of a pickle (name, argument, bytes), and where it ends."""
    file = io.BytesIO(content)
    file.seek(start)
    found = [(opcode.name, argument, position) for opcode, argument, position in pickletools.genops(file)]
    ends = [*(position for *_, position in found[1:]), file.tell()]
    whole = [(name, argument, content[at:end]) for (name, argument, at), end in zip(found, ends, strict=True)]
    return whole, file.tell()


def _odd_literal(argument: Any, draw: Random) -> bytes:
    if isinstance(argument, str) and draw.random() < 0.7:
        return pickle.dumps(
            draw.choice(("", "x", argument + "x", "\0", "\ud800x"[1:], "y" * 70_000, "../x", "_parent")), 2
        )[2:-1]
    number = draw.choice((*EDGES, -1, -(2**63), 2**70, 10**300, 1.5, float("nan"), True, None, b"x", (), [], {}))
    return pickle.dumps(number, 3)[2:-1]


def edit_pickle(content: bytes, draw: Random, start: int = 0) -> bytes:
    """Take away, double, exchange and insert opcodes of the pickle at ``start``, or other arguments; the rest stays."""
    opcodes, end = _opcodes(content, start)
    parts = [part for name, _, part in opcodes if name != "FRAME"]
    plain = [(name, argument) for name, argument, _ in opcodes if name != "FRAME"]
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(1, max(2, len(parts)))
        how = draw.randrange(11)
        if how == 0:
            parts[at : at + draw.choice((1, 1, 3, 20))] = []
        elif how == 1:
            parts.insert(at, parts[draw.randrange(len(parts))] * draw.choice((1, 1, 2, 1000)))
        elif how == 2 and at < len(parts):
            other = draw.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif how == 3:
            parts.insert(at, _call(*draw.choice(_EVIL), form=draw.randrange(9)) + b"0")
        elif how == 4:
            parts.insert(at, draw.choice(_LOOSE) * draw.choice((1, 1, 2, 100)))
        elif how == 5:
            depth = draw.choice((10, 70, 5000))
            parts.insert(at, b"]" * depth + b"a" * (depth - 1) + b"0")
        elif how == 6:
            parts.insert(at, b"(N" + b"2t" * draw.choice((5, 24)) + b"0")  # doubles with each step
        elif how == 7:
            parts.insert(
                at,
                draw.choice(
                    (
                        b"h\x00",
                        b"h\xff",
                        b"q\x00",
                        b"j\xff\xff\xff\xff",
                        b"\x8a\xff" + b"\xff" * 255,
                        b"\x88",
                        b"\x82\x01",
                    )
                ),
            )
        elif how == 8:  # another name in place of one
            names = [place for place, (name, _) in enumerate(plain) if name == "GLOBAL" and place < len(parts)]
            if names:
                module, name, *_ = draw.choice(_EVIL)
                parts[draw.choice(names)] = f"c{module}\n{name}\n".encode()
        else:
            literals = [
                place
                for place, (name, argument) in enumerate(plain)
                if place < len(parts)
                and argument is not None
                and ("INT" in name or "UNICODE" in name or "STRING" in name)
            ]
            if literals:
                place = draw.choice(literals)
                parts[place] = _odd_literal(plain[place][1], draw)
        plain = plain if len(plain) == len(parts) else [("", None)] * len(parts)
    return content[:start] + b"".join(parts) + content[end:]


def edit_legacy(content: bytes, draw: Random) -> bytes:
    """Edit a file of ``torch.save`` before version 1.6: five pickles, and the numbers behind them."""
    how = draw.randrange(10)
    if how < 3:
        return damage_bytes(content, draw)
    starts, end = [0], 0
    for _ in range(5):
        _, end = _opcodes(content, starts[-1])
        starts.append(end)
    if how == 3:
        number = draw.choice(starts[:5])
        _, stop = _opcodes(content, number)
        return content[:number] + planted_pickle(draw) + content[stop:]
    if how == 4:  # how many numbers a storage has
        return content[:end] + struct.pack("<Q", draw.choice(EDGES)) + content[end + 8 :]
    return edit_pickle(content, draw, draw.choice((*starts[:5], starts[3], starts[3], starts[4])))


# Zip archives


def entries_of(content: bytes) -> dict[str, bytes]:
    """Return the files of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(entries: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive; names may come twice."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.NameToInfo.pop(name, None)  # no warning about a name that comes twice
            archive.writestr(info, content)
    return file.getvalue()


_FIELDS = {  # of a directory, of what stands before a file, and of the end: place and size
    b"PK\x01\x02": (
        *((4, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4)),
        *((28, 2), (30, 2), (32, 2), (34, 2), (38, 4), (42, 4)),
    ),
    b"PK\x03\x04": ((6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x05\x06": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}


def edit_directory(content: bytes, draw: Random) -> bytes:
    """Change a field of an archive's directory, of what stands before a file, or of the archive's end."""
    changed = bytearray(content)
    kind = draw.choice((b"PK\x01\x02", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"))
    fields = _FIELDS[kind]
    found = [match.start() for match in re.finditer(re.escape(kind), content)]
    if not found:
        return damage_bytes(content, draw)
    at, (offset, size) = draw.choice(found), draw.choice(fields)
    old = int.from_bytes(changed[at + offset : at + offset + size], "little")
    new = draw.choice((draw.choice(EDGES), old + 1, old - 1, draw.choice(found), 8, 12, 93)) % 2 ** (8 * size)
    changed[at + offset : at + offset + size] = new.to_bytes(size, "little")
    return bytes(changed)


def edit_zip(content: bytes, draw: Random, edit: Callable[[str, bytes, Random], bytes]) -> bytes:
    """Edit an archive: its bytes, its directory, its names, or one of its files with ``edit``."""
    how = draw.randrange(12)
    if how < 2:
        return damage_bytes(content, draw)
    if how < 5:
        return edit_directory(content, draw)
    entries = [*entries_of(content).items()]
    number = draw.randrange(len(entries))
    name, inner = entries[number]
    if how == 5:
        names = (
            "",
            "/",
            "../evil.py",
            "/etc/passwd",
            "x\0y",
            "\u202e",
            "a" * 3000,
            name.upper(),
            entries[0][0],
            name + "/",
        )
        entries[number] = draw.choice(names), inner
    elif how == 6:
        entries.insert(draw.randrange(len(entries) + 1), (name, edit(name, inner, draw)))
    elif how == 7:
        return zipped(
            [*entries, ("zeros", b"\0" * 10**7)],
            draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
        )
    else:
        entries[number] = name, edit(name, inner, draw)
    return zipped(entries, zipfile.ZIP_DEFLATED if draw.random() < 0.15 else zipfile.ZIP_STORED)


def edit_torch(content: bytes, draw: Random) -> bytes:
    """Edit an archive of ``torch.save``, its pickle more often than the rest."""

    def edit(name: str, inner: bytes, draw: Random) -> bytes:
        return edit_pickle(inner, draw) if name.endswith("data.pkl") else damage_bytes(inner, draw)

    if draw.random() < 0.45:
        entries = entries_of(content)
        (name,) = [name for name in entries if name.endswith("/data.pkl")]
        entries[name] = planted_pickle(draw) if draw.random() < 0.3 else edit_pickle(entries[name], draw)
        if draw.random() < 0.1:
            entries[f"{name.split('/')[0]}/code/evil.py"] = _TOUCH.encode()
        return zipped([*entries.items()])
    return edit_zip(content, draw, edit)


# numpy


_DESCR = (
    "'|O'",
    "'<f8'",
    "'<U1000000'",
    "'|V4294967295'",
    "[('a', '|O')]",
    "'<M8[s]'",
    "'|S0'",
    "'|b1'",
    "'>i8'",
    "'<c16'",
    "1",
    "'<f2'",
)
_SHAPES = (
    "()",
    "(0,)",
    "(4294967296, 4294967296)",
    "(-1,)",
    "(10000000, 0)",
    "(6, 100000, 100000, 3)",
    "(1,) * 9",
    "(True,)",
    "[6]",
)


def edit_npy(name: str, content: bytes, draw: Random) -> bytes:
    """Edit the header of an array, its bytes, or put pickled objects in their place."""
    how = draw.randrange(8)
    if how < 2 or content[:6] != b"\x93NUMPY":
        return damage_bytes(content, draw)
    start = 10 if content[6] == 1 else 12
    (length,) = struct.unpack_from("<H" if start == 10 else "<I", content, 8)
    header, body = content[start : start + length].decode("latin1"), content[start + length :]
    if how == 2:
        header, body = re.sub(r"'descr': [^,]+", "'descr': '|O'", header), planted_pickle(draw)
    elif how == 3:
        header = re.sub(r"'descr': [^,]+", lambda _: f"'descr': {draw.choice(_DESCR)}", header)
    elif how == 4:
        header = re.sub(r"\([^)]*\)", lambda _: draw.choice(_SHAPES), header)
    elif how == 5:
        header = draw.choice(
            ("{" * 200, "(" * 3000, "[" + "-" * 5000 + "1]", "__import__('os')", header + "x" * 60_000, "{'a': 1}")
        )
    elif how == 6:
        header = header.replace("False", draw.choice(("True", "0", "None")))
    else:
        header = damage_bytes(header.encode("latin1"), draw).decode("latin1")
    version = draw.choice((1, 1, 1, 2, 3, 0, 255))
    size = min(len(header), 65_535)
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", size)
        + header.encode("latin1")[:size]
        + body
    )


# Pictures


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    """Return the chunks of a PNG: kind and data."""
    found, place = [], 8
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def png_of(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG of chunks, with checksums that fit."""
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def edit_png(content: bytes, draw: Random) -> bytes:
    """Edit the chunks of a PNG."""
    chunks = chunks_of(content)
    for _ in range(draw.randrange(1, 3)):
        at = draw.randrange(len(chunks))
        kind, data = chunks[at]
        how = draw.randrange(7)
        if how == 0:
            header = bytearray(chunks[0][1])
            header[draw.choice((0, 4)) :][:4] = b""
            sizes = [draw.choice((0, 1, 8, 13_000, 2**16, 2**31 - 1, 2**31)) for _ in range(2)]
            tail = bytes([draw.choice((1, 2, 4, 8, 16, 3)), draw.choice((0, 2, 3, 4, 6, 9)), 0, 0, draw.choice((0, 1))])
            chunks[0] = b"IHDR", struct.pack(">II", *sizes) + tail
        elif how == 1:
            chunks.insert(at, draw.choice(chunks))
        elif how == 2:
            chunks.pop(at)
        elif how == 3:
            bomb = zlib.compress(b"\0" * draw.choice((10**5, 10**7)))
            name = draw.choice((b"zTXt", b"iCCP", b"iTXt"))
            chunks.insert(1, (name, b"a\0\0" + (b"\1\0\0\0" if name == b"iTXt" else b"") + bomb))
        elif how == 4:
            chunks[at] = (
                draw.choice((b"IDAT", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"gAMA", b"IEND")),
                data,
            )
        elif how == 5:
            chunks[at] = b"IDAT", zlib.compress(b"\0" * draw.choice((10, 10**5, 10**7)))
        else:
            chunks[at] = kind, damage_bytes(data, draw)
        if not chunks:
            break
    return png_of(chunks)


def planted_picture(draw: Random) -> bytes:
    """Return what other programs than ours would run: PostScript, formats with programs behind them, and bombs."""
    size = draw.choice((8, 10**5))
    post = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 {size} {size}\n%%EndComments\n"
    program = draw.choice(
        (f"({MARK}) (w) file closefile\n", "{} loop\n", f"%pipe%touch {MARK}\n", "(/etc/passwd) (r) file\n")
    )
    eps = (post + program + "showpage\n%%EOF\n").encode()
    return draw.choice(
        (
            *(eps, eps, eps, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(eps)) + b"\0" * 18 + eps),
            b"%PDF-1.4\n1 0 obj << /OpenAction << /S /Launch >> >> endobj\n",
            b"\xd7\xcd\xc6\x9a" + b"\0" * 60,  # WMF
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
            b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0" * 40,
            b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + b"\0" * 30,
            b"SIMPLE  =                    T" + b" " * 2850,  # FITS
            b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
            b"\x00\x00\x01\x00\x01\x00\x00\x00" + b"\0" * 40,  # ICO
            b"P6 100000 100000 255\n" + b"\0" * 50,
            b"P3 2 2 99999999999999\n" + b"9" * 500,
            b"BM" + struct.pack("<IIIIiiHHI", 99, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0) + b"\0" * 30,
            b"II*\0" + struct.pack("<I", 8) + b"\xff\xff" + b"\0" * 60,
            b"#define x_width 99999\n#define x_height 99999\nstatic char x_bits[] = {\n",
        )
    )


def edit_picture(content: bytes, draw: Random) -> bytes:
    """Damage a picture, or put something else under its name."""
    if draw.random() < 0.12:
        return planted_picture(draw)
    if content[:4] == b"\x89PNG" and draw.random() < 0.6:
        return edit_png(content, draw)
    return damage_bytes(content, draw)


# TOML


_TOML = (
    *(
        "true",
        "-1",
        "0",
        "1e308",
        "nan",
        "inf",
        "9" * 30,
        "9" * 5000,
        '""',
        '"\\u0000"',
        '"x\\ny"',
        '"../.."',
        '"/dev/zero"',
    ),
    *(
        "[]",
        "{}",
        "[[]]",
        "[" * 40 + "]" * 40,
        "[" * 5000,
        "{a = " * 50 + "1" + "}" * 50,
        "1979-05-27",
        "07:32:00",
        '"digits"',
    ),
    *(
        '"torchvision:CIFAR10"',
        '"http://127.0.0.1:9/"',
        "[1, 1]",
        "[0.1, 0.1]",
        "[" + "0, " * 3000 + "]",
        '"""\n"""',
        "'\u202e'",
    ),
    *(json.dumps(name) for name in CODE_NAMES),
    *(str(edge) for edge in EDGES),
)
_LINES = (
    *(
        "[[data]]",
        "[[attacks]]",
        "[[defences]]",
        "[[exclude]]",
        "[run]",
        "[trainer]",
        "[attacks.settings]",
        "[attacks.grid]",
    ),
    *(
        'name = "digits"',
        'method = "badnets"',
        'method = "none"',
        'arch = ["small_cnn"]',
        "fine_tune = true",
        'reason = "x"',
    ),
    *(
        "seeds = [0, 1]",
        "clean = [0.5]",
        "grid = { size = [1, 2, 3] }",
        "size = 2",
        "threads = 1",
        "image_size = 8",
        "x.y.z = 1",
    ),
    "a." * 600 + "b = 1",
)


def edit_toml(text: bytes, draw: Random) -> bytes:
    """Exchange values, lines and tables of a plan."""
    if draw.random() < 0.1:
        return damage_bytes(text, draw)
    lines = text.decode().splitlines()
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(lines))
        how = draw.randrange(7)
        if how == 0:
            lines.pop(at)
        elif how == 1:
            lines.insert(at, draw.choice(lines))
        elif how == 2:
            lines.insert(at, draw.choice(_LINES))
        elif how == 3:
            lines[at] = damage_bytes(lines[at].encode() or b" ", draw).decode("latin1")
        elif how == 4 and "=" in lines[at]:
            key, _, value = lines[at].partition("=")
            lines[at] = re.sub(r"[0-9.]+|\"[^\"]*\"", lambda _: draw.choice(_TOML), value, count=1).join(
                (f"{key}=", "")
            )
        elif "=" in lines[at]:
            key = lines[at].partition("=")[0]
            lines[at] = f"{key}= {draw.choice(_TOML)}"
        if not lines:
            lines = [draw.choice(_LINES)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")
