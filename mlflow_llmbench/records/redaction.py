"""Mask secrets, and escape characters that act on a terminal, in everything that leaves the process.

Logged fields are listed explicitly elsewhere (parameters, metrics and tags of the vocabulary, fingerprint); the
environment and the command line are not among them. But a listed field can hold foreign text: an error of a model, of
the Hub or of a store, a path that was given. Such text passes `redact` on its way into an error of ours (`errors`), the
journal (`journal`), the store (`tracking`) or the terminal (`Terminal`). Masked are

- the values of environment variables with secret-looking names, and the tokens in the Hub's and MLflow's own files;
- in any text: user and password of an address, signatures and keys in its query, `password=…`, `Bearer …`, and tokens
  of known shapes.

Numbers stay as they are: only text is searched, and a purely numeric value is not treated as a secret.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar
from urllib.parse import quote

T = TypeVar("T")

MASK = "***"

LEAST_LENGTH = 8
"""Minimum length of a secret in characters: masking the value of `KEY=1` would blank every 1."""

LONGEST_WORD = 15
"""Lower-case words up to this many letters are not secrets: `POSTGRES_PASSWORD=llmbench` would blank our own name."""

SECRET_WORDS = frozenset(
    ["AUTH", "BEARER", "COOKIE", "CREDS", "DSN", "JWT", "KEY", "KEYS", "PASS", "PAT", "PWD", "SAS", "WEBHOOK"]
)
SECRET_PARTS = ("SECRET", "PASSW", "PASSPHRASE", "CREDENTIAL", "APIKEY", "ACCESSKEY", "PRIVATEKEY", "CONNECTION_STRING")
"""Words and parts that mark the name of an environment variable as secret. Words that end in TOKEN do too."""

TRACKING_PREFIXES = ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "GCLOUD_", "CLOUDSDK_", "DATABRICKS_")
"""Settings of tracking stores and their clouds. A worker knows no store and gets none of them."""

HUB_PREFIXES = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_")
PROXIES = frozenset(["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY"])
"""Settings that a download needs, secret or not."""

_NAMED = (
    r"(?:pass(?:word|wd|phrase)|pwd|secret|credentials?|(?:api|access|account|private|shared[-_]?access)[-_]?key"
    r"|(?:access|auth|security|sas)[-_]?token)"
)
_DIGIT, _LOWER, _CAPITAL = (re.compile(f"[{letters}]") for letters in ("0-9", "a-z", "A-Z"))
_VARIABLE = re.compile(r"\$(?:\{[A-Z_][A-Z0-9_]*\}|[A-Z_][A-Z0-9_]*)")
"""A reference to an environment variable (see `references`), which stands in a parameter in place of a secret."""
_RANDOM = re.compile("[A-Za-z0-9]{24,}")
"""Keys are long runs of letters of both cases and digits. Names have separators, and digests one case."""
_KEPT: set[str] = set()
"""Values that were read for references of a parameter: secrets of this process, whatever their variables are called."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Pattern of a secret in foreign text. The group `secret` is masked if `accepts` returns True for it.

    Text without any of `signs`, in lower case, is not searched. `accepts` takes the place of a look-ahead, which a text
    of many beginnings (`token=token=…`) would make quadratic: here each match is passed over as a whole.
    """

    signs: tuple[str, ...]
    pattern: re.Pattern[str]
    accepts: Callable[[str], object] = bool

    def found(self, text: str, lower: str) -> Iterator[re.Match[str]]:
        """Yield the matches with a secret; `lower` is the text in lower case."""
        if any(sign in lower for sign in self.signs):
            yield from (match for match in self.pattern.finditer(text) if self.accepts(match["secret"]))


def _shape(signs: str, pattern: str, accepts: Callable[[str], object] = bool) -> Shape:
    return Shape(tuple(signs.split()), re.compile(pattern), accepts)


def _mixed(secret: str) -> bool:
    return bool(_DIGIT.search(secret) and _LOWER.search(secret))


def _literal(secret: str) -> bool:
    return not _VARIABLE.fullmatch(secret)


_USER = _shape("@", r"//(?P<secret>[^\s/?#@\"'<>]{1,512})@")
_PASSWORD = _shape(
    "@", r"//(?P<secret>[^\s/@:\"'<>]{0,128}:(?!\d+(?:[/?#\s]|$))[^\s\"'<>]{1,512}?)@(?![^\s/?#\"'<>]*@)"
)
SHAPES = (
    _PASSWORD,
    _USER,
    _shape(
        "=",
        rf"(?i)[?&;](?:[\w.-]{{0,64}}(?:signature|{_NAMED})|sig|key|token|auth|awsaccesskeyid)="
        r"(?P<secret>[^&\s'\"<>]+)",
    ),
    _shape(
        ": =", rf"(?i){_NAMED}[\"']?\s*[=:]\s*[\[({{]?\s*[\"']?(?P<secret>[^\s\"',;&]{{{LEAST_LENGTH},}})", _literal
    ),
    _shape("token", r"(?i)token[\"']?\s*[=:]\s*[\[({]?\s*[\"']?(?P<secret>[\w.+/~=-]{16,})", _mixed),
    _shape(
        "--",
        rf"(?i)(?<!-)--[\w-]{{0,64}}?(?:{_NAMED}|token|-key)[ =]+[\"']?(?P<secret>[^\s\"',;]{{{LEAST_LENGTH},}})",
        lambda secret: not secret.isdecimal(),
    ),
    _shape(
        "authorization",
        r"(?i)\bauthorization[\"']?\s*[=:]\s*[\"']?(?!(?:bearer|basic)\b)(?P<secret>[^\s\"',;]{8,})",
        _literal,
    ),
    _shape("bearer", r"(?i)\bbearer\s+(?P<secret>[\w.+/~=-]{8,})"),
    _shape("basic", r"(?i:\bbasic)\s+(?P<secret>[A-Za-z0-9+/]{8,}=*)", re.compile("[A-Z0-9=]").search),
    _shape("cookie", r"(?i)\bcookie[\"']?\s*[=:]\s*[\"']?(?P<secret>[^\s\"'][^\r\n\"']{7,})", _literal),
    _shape("hf_", r"(?P<secret>hf_[A-Za-z0-9]{30,})"),
    _shape("hf_", r"(?<![A-Za-z0-9])(?P<secret>hf_[A-Za-z0-9]{8,})", lambda secret: re.search("[A-Z0-9]", secret[3:])),
    _shape("_", r"(?P<secret>gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|api_org_[A-Za-z]{30,})"),
    _shape(
        "_",
        r"(?<![A-Za-z0-9])(?P<secret>[prs]k_(?:live|test|prod)_\w{10,}|npm_[A-Za-z0-9]{30,}|(?:gsk|r8)_[A-Za-z0-9]{20,}"
        r"|dop_v1_[0-9a-f]{32,}|glsa_\w{20,}|lsv2_[a-z]{2}_\w{20,}|shpat_[0-9a-f]{20,})",
    ),
    _shape(
        "glpat- xox xapp- nvapi- xai- pplx- pypi- aiza dapi ya29. hvs. sg. tskey-",
        r"(?<![A-Za-z0-9])(?P<secret>(?:glpat|xox[abeprs]|xapp|nvapi|xai|pplx|pypi|tskey)-[\w-]{10,}|AIza[\w-]{20,}"
        r"|dapi[0-9a-f]{16,}|ya29\.[\w-]{20,}|hvs\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,})",
    ),
    _shape("sk-", r"(?<![A-Za-z0-9])(?P<secret>sk-[\w-]{16,})", _DIGIT.search),
    _shape("akia asia", r"(?<![A-Za-z0-9])(?P<secret>(?:AKIA|ASIA)[A-Z0-9]{12,})"),
    _shape("eyj", r"(?<![A-Za-z0-9])(?P<secret>eyJ[\w-]{8,}(?:\.[\w-]*){0,2})", re.compile(r"\.[\w-]{8}").search),
    _shape("hooks.slack.com", r"hooks\.slack\.com/\w{1,20}/(?P<secret>[\w/]{20,})"),
    _shape("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?P<secret>(?:[\w\s+/=,:.\\]|-(?!----END))+)"),
)
"""Patterns of secrets in foreign text; the group `secret` is masked.

In turn: user and password of an address, which may hold a slash or an @ where SQLAlchemy reads it; a user, or a token
in its place; signatures and keys in a query; names such as `password` before `=` or `:`; tokens named as such; options
of a command; headers; tokens in their makers' formats (Hugging Face, GitHub, Stripe, npm, Groq, Replicate,
DigitalOcean, Grafana, LangSmith, Shopify, GitLab, Slack, NVIDIA, xAI, Perplexity, PyPI, Google, Databricks, Vault,
SendGrid, Tailscale, OpenAI, AWS, JSON web tokens); private keys. A maker's prefix may follow an underscore: a key in
the name of a file or an experiment is one too.
"""

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that act instead of being shown: controls, line separators, changes of direction, lone surrogates."""


def redact(text: str) -> str:
    """Return the text with every secret masked. Idempotent."""
    return _mask(text, list(known_secrets()))


def masker() -> Callable[[str], str]:
    """Return a function like `redact` for many texts: it looks for the secrets of this process once, if it is called.

    Most events of a measurement have no text.
    """
    known: list[str] | None = None

    def mask(text: str) -> str:
        nonlocal known
        known = list(known_secrets()) if known is None else known
        return _mask(text, known)

    return mask


def excerpt(text: str, limit: int) -> str:
    """Return the beginning of a foreign text, masked before it is cut: half a secret is not recognised."""
    return redact(text[: limit + 4096])[:limit]


def redact_all(data: T) -> T:
    """Return a copy of the data with every string redacted, in mappings, lists, tuples and dataclasses.

    Numbers are not searched.
    """
    mask = masker()

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return mask(value)
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return (list if isinstance(value, list) else tuple)(map(walk, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: walk(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        return value

    return walk(data)  # type: ignore[no-any-return]


def escape_controls(text: str, keep: str = "") -> str:
    r"""Return the text with terminal control characters escaped (`\x1b`, `\n`, `\u202e`), except those in `keep`."""
    return CONTROLS.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape", "surrogatepass").decode(),
        text,
    )


def is_secret_name(name: str) -> bool:
    """Return True if an environment variable of this name holds a secret."""
    upper = name.upper()
    words = re.split(r"[^A-Z0-9]+", upper)
    return upper != "PWD" and (
        any(word in SECRET_WORDS or word.endswith("TOKEN") for word in words)
        or any(part in upper for part in SECRET_PARTS)
    )


def looks_secret(text: str) -> bool:
    """Return True if a text has what is masked, or a run of letters and digits such as keys are."""
    runs = (all(kind.search(run) for kind in (_DIGIT, _LOWER, _CAPITAL)) for run in _RANDOM.findall(text))
    return redact(text) != text or any(runs)


def keep_secret(value: str) -> None:
    """Mask a value from now on, as if it were that of a variable whose name is that of a secret."""
    _KEPT.add(value)


def known_secrets() -> Iterator[str]:
    """Yield the secrets that this process knows, longest first, so that none is masked only in part."""
    found = (*_in_variables(tuple(os.environ.items())), *_in_files(), *_KEPT)
    telling = {secret for secret in found if _is_telling(secret)}
    telling |= {spelling for secret in telling for spelling in (quote(secret, safe=""), json.dumps(secret)[1:-1])}
    yield from sorted(telling, key=len, reverse=True)


def worker_environment(environment: Mapping[str, str], downloads: bool) -> dict[str, str]:
    """Return the variables that a worker may have: none of tracking stores or clouds, and none that hold a secret.

    `downloads` adds those of the Hub and of proxies. Ours (`LLMBENCH_…`) stay, since they are meant for the worker.
    """
    secrets = {value for name, value in environment.items() if is_secret_name(name) and _is_telling(value)}

    def stays(name: str, value: str) -> bool:
        upper = name.upper()
        if upper.startswith("LLMBENCH_") or (downloads and (upper.startswith(HUB_PREFIXES) or upper in PROXIES)):
            return True
        return not (
            upper.startswith(TRACKING_PREFIXES) or is_secret_name(name) or value in secrets or _mask(value, ()) != value
        )

    return {name: value for name, value in environment.items() if stays(name, value)}


class Terminal:
    """Text stream that masks secrets and escapes control characters, except newline, carriage return and tab."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the redacted text; return the length of the original."""
        self.stream.write(escape_controls(redact(text), keep="\n\r\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _mask(text: str, known: Iterable[str]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    for shape in SHAPES:
        spans = [match.span("secret") for match in shape.found(text, text.lower())]
        if spans:
            ends = [0, *(end for _, end in spans)]
            text = (
                "".join(text[end:start] + MASK for end, (start, _) in zip(ends, spans, strict=False)) + text[ends[-1] :]
            )
    return text


def _shaped(text: str) -> Iterator[str]:
    """Yield the parts of a text that look like secrets; for user:password also the password alone.

    A user alone is left out, since it may be a common name.
    """
    for shape in SHAPES:
        for found in shape.found(text, text.lower()) if shape is not _USER else ():
            yield found["secret"]
            if shape is _PASSWORD:
                yield found["secret"].partition(":")[2]


def _is_telling(secret: str) -> bool:
    """Return True if a value is worth masking: not a common word, a number or an existing path."""
    plain = re.fullmatch(rf"[a-z]{{,{LONGEST_WORD}}}|[\d.,:_+eE-]*", secret)
    return len(secret) >= LEAST_LENGTH and not plain and not os.path.exists(secret)


@functools.lru_cache(maxsize=1)
def _in_variables(environment: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """Return the secrets in environment variables, by name and by shape. Cached: finding them takes most of a call."""
    named = {value for name, value in environment if is_secret_name(name)}
    return frozenset(named | {part for _, value in environment for part in _shaped(value)})


def _in_files() -> Iterator[str]:
    """Yield the tokens that `hf auth login` and MLflow's credentials file have left on this disk."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    yield _text_of(os.environ.get("HF_TOKEN_PATH") or f"{hub}/token").strip()
    for line in (_text_of(f"{hub}/stored_tokens") + _text_of("~/.mlflow/credentials")).splitlines():
        name, equals, value = line.partition("=")
        if equals and is_secret_name(name.strip()):
            yield value.strip()


def _text_of(file: str) -> str:
    path = Path(os.path.expanduser(file))
    try:
        if not path.is_file():  # a pipe would be waited for
            return ""
        with path.open(encoding="utf-8") as opened:
            return opened.read(1 << 20)
    except (OSError, UnicodeDecodeError):
        return ""
