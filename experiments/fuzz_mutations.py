"""Structure-aware mutations: valid files with one thing or several wrong in them."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable

Mutation = Callable[[bytes, random.Random], bytes]

TEXTS = (
    *("", ".", "..", "../outside.safetensors", "/etc/passwd", "a\\b", "a/b", "\0", "\ud800", "\u202e", "x" * 300, "\n"),
    *("model.safetensors", "__metadata__", "__class__", "$(id)", "%s", "{0}", "cos\nsystem\n(S'id'\ntR.", "\x1b[2J"),
    *("F32", "BF16", "I64", "F8_E4M3", "BOOL", "assistant", "system", "nan", "true", "null", "é🙂", "<|im_start|>"),
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    10,
    96,
    255,
    256,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
)
REALS = (0.0, -0.0, 1e-300, 5e-324, 1e308, -1.0, 0.5, 1e-6, 1.0000001)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "0x1",
    "01",
    "[" * 3000,
    '{"a":' * 3000,
    "'a'",
    "//",
    "\ufeff",
)


def interesting(rng: random.Random) -> object:
    """A value that a parser may stumble over."""
    return rng.choice(
        (rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(REALS), None, True, False, [], {}, [[]], {"": {}})
    )


def json_value(value: object, rng: random.Random) -> object:
    """The same with one part replaced, removed, doubled, renamed or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        how = rng.random()
        rest = {name: child for name, child in value.items() if name != key}
        if how < 0.6:
            return value | {key: json_value(value[key], rng)}
        if how < 0.75:
            return rest
        if how < 0.9:
            return rest | {rng.choice((str(rng.choice(TEXTS)), key[:-1], key.upper(), key + "s")): value[key]}
        return value | {str(rng.choice(TEXTS)): interesting(rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        how = rng.random()
        if how < 0.6:
            return [*value[:place], json_value(value[place], rng), *value[place + 1 :]]
        if how < 0.8:
            return value[:place] + value[place + 1 :]
        return [*value, value[place]] if how < 0.9 else value * rng.choice((2, 50))
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 2, 8, -value, value, 2**32))
    return interesting(rng) if rng.random() < 0.9 else [value]


def json_text(data: bytes, rng: random.Random) -> bytes:
    """Mutate a JSON document; where it is none any more, or now and then, its text."""
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError):
        return line_text(data, rng)
    if rng.random() < 0.15:
        return line_text(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = json_value(value, rng)
    return dumped(value, rng)


def dumped(value: object, rng: random.Random) -> bytes:
    """JSON text, with one of its tokens replaced by what no encoder writes, or a key doubled, now and then."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, 1)))
    scalars = list(re.finditer(r"(?<=[:\[,]) *(\"[^\"]*\"|-?\d[^,\]}\s]*|null|true|false)", text))
    if scalars and rng.random() < 0.15:
        at = rng.choice(scalars)
        text = text[: at.start()] + rng.choice(RAW) + text[at.end() :]
    pairs = list(re.finditer(r"\"[^\"]*\": *(\"[^\"]*\"|-?\d+)(?=[,}])", text))
    if pairs and rng.random() < 0.1:
        at = rng.choice(pairs)
        text = text[: at.end()] + "," + at.group() + text[at.end() :]
    return text.encode(errors="surrogatepass")


def lines(data: bytes, rng: random.Random) -> bytes:
    """Mutate one line of a JSON-lines file, or the order and number of its lines."""
    rows = data.split(b"\n")
    place = rng.randrange(len(rows))
    how = rng.random()
    if how < 0.7:
        rows[place] = json_text(rows[place], rng)
    elif how < 0.8:
        del rows[place]
    elif how < 0.9:
        rows.insert(place, rows[rng.randrange(len(rows))])
    else:
        return line_text(data, rng)
    return b"\n".join(rows)


def line_text(data: bytes, rng: random.Random) -> bytes:
    """Mutate text: cut, double, insert, or change a byte."""
    place, end = sorted(rng.randint(0, len(data)) for _ in range(2))
    how = rng.randrange(6)
    if how == 0:
        return data[:place] + data[min(end, place + 40) :]
    if how == 1:
        return data[:end] + data[place:end] + data[end:]
    if how == 2:
        return data[:place]
    if how == 3:
        token = rng.choice((*RAW, *TEXTS)).encode(errors="surrogatepass")
        return data[:place] + token * rng.choice((1, 1, 40)) + data[place:]
    byte = bytes([rng.choice((0, 10, 13, 34, 92, 0x7F, 0x80, 0xC0, 0xED, 0xFF, rng.randrange(256)))])
    return data[:place] + byte + data[place + (how == 4) :]


def toml(data: bytes, rng: random.Random) -> bytes:
    """Mutate one line of a TOML file."""
    rows = data.split(b"\n")
    place = rng.randrange(len(rows))
    key, equals, value = rows[place].partition(b" = ")
    how = rng.random()
    if how < 0.45 and equals:
        raw = (
            "inf",
            "nan",
            "-1",
            "0x" + "f" * 4000,
            "1979-05-27T07:32:00+23:59",
            "[]",
            "{}",
            "[[",
            "true",
            "0.5",
            *RAW,
        )
        token = rng.choice(raw) if rng.random() < 0.5 else json.dumps(interesting(rng))
        rows[place] = key + equals + token.encode(errors="surrogatepass")
    elif how < 0.55 and equals:
        rows[place] = key + equals + line_text(value, rng)
    elif how < 0.65:
        rows[place] = re.sub(rb"[\w.-]+", lambda _: json.dumps(rng.choice(TEXTS)).encode(), rows[place], count=1)
    elif how < 0.75:
        del rows[place]
    elif how < 0.85:
        rows.insert(place, rows[rng.randrange(len(rows))])
    else:
        return line_text(data, rng)
    return b"\n".join(rows)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header of a safetensors file, its length, or what follows."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    how = rng.random()
    if how < 0.75:
        header = _header(header, rng)
        return len(header).to_bytes(8, "little") + header + body
    if how < 0.85:
        length = rng.choice((0, 1, 7, size - 1, size + 1, len(data), 100_000_001, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
        return struct.pack("<Q", length % 2**64) + data[8:]
    if how < 0.95:
        cut = rng.randint(0, len(body))
        return data[: 8 + size] + (body[:cut] if rng.random() < 0.5 else body + body[:cut])
    return line_text(data, rng)


def _header(header: bytes, rng: random.Random) -> bytes:
    try:
        entries: object = json.loads(header)
    except (ValueError, RecursionError):
        return line_text(header, rng)
    names = sorted(entries) if isinstance(entries, dict) else []
    if isinstance(entries, dict) and names and rng.random() < 0.4:
        name, other = rng.choice(names), rng.choice(names)
        how = rng.randrange(4)
        if how == 0:
            entries = {rng.choice(TEXTS) if key == name else key: value for key, value in entries.items()}
        elif how == 1:
            entries = entries | {name: entries[other]}
        elif how == 2:
            text = json.dumps(entries)
            return (text[:-1] + f", {json.dumps(name)}: {json.dumps(entries[other])}}}").encode()
        elif isinstance(entries[name], dict):
            dtype = rng.choice(
                ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64")
            )
            entries = entries | {name: entries[name] | {"dtype": dtype}}
    else:
        entries = json_value(entries, rng)
    return dumped(entries, rng)
