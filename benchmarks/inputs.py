"""Attack every file that is read, through the command line: each attack ends soon, in little memory, with one line.

Each attack is a child process under a limit of address space. `held` means: no traceback, no signal, and either one
line on stderr and exit code 1 or 2, or, for inputs that are unusual but right, exit code 0.

    python benchmarks/inputs.py [--out FILE] [--only WORD]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT_BYTES = 4 << 30
"""Address space of each child: the libraries that a command imports map about 2 GB of it."""

LIMIT_S = 60
MOST_S, MOST_BYTES = 15.0, 1 << 30
"""Goals: seconds and resident memory of each attack."""

HUGE = 50 * 10**9
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512, "intermediate_size": 128,
    "max_position_embeddings": 256, "dtype": "float32",
}  # fmt: skip
DEEP = b"[" * 1_000_000
DEEP_OBJECTS = b'{"a":' * 200_000

Attack = Callable[[Path], list[str]]
"""Write the files of an attack into an empty folder, and return the command."""


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    if not path.exists():
        path.write_bytes(b"{}")
    os.truncate(path, HUGE)


def writes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None  # type: ignore[func-returns-value]


def many(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"[")
        for _ in range(60):
            file.write(b"{}," * 1_000_000)
        file.write(b"{}]")


ANY_FILE: dict[str, Callable[[Path], None]] = {
    "1,000,000 levels": writes(DEEP),
    "200,000 levels of objects": writes(DEEP_OBJECTS),
    "a sparse file of 50 GB": sparse,
    "a pipe": pipe,
    "/dev/zero": device,
    "a Git LFS pointer": writes(LFS),
    "zero bytes": writes(bytes(100_000)),
}


def checkpoint(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


def plan(folder: Path) -> list[str]:
    return ["plan", "--model", str(folder)]


def of_checkpoint(name: str, damage: Callable[[Path], None]) -> Attack:
    def attack(folder: Path) -> list[str]:
        checkpoint(folder)
        damage(folder / name)
        return plan(folder)

    return attack


def of_config(**changes: Any) -> Attack:
    return lambda folder: plan(checkpoint(folder, **changes))


def of_option(option: str, name: str, damage: Callable[[Path], None], *more: str) -> Attack:
    def attack(folder: Path) -> list[str]:
        damage(folder / name)
        return ["plan", "--backend", "fake", "--model", "fake:ttft_ms=1", *more, option, str(folder / name)]

    return attack


def of_command(name: str, damage: Callable[[Path], None], *command: str) -> Attack:
    def attack(folder: Path) -> list[str]:
        damage(folder / name)
        return [part.replace("FILE", str(folder / name)).replace("FOLDER", str(folder)) for part in command]

    return attack


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"", size: int | None = None) -> Attack:
    def attack(folder: Path) -> list[str]:
        path = folder / "m.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest)
        if size:
            os.truncate(path, size)
        return plan(path)

    return attack


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n".encode() for n in range(1, 40)
)
MERGES = b"a0: &a0 {x: 1, y: 2}\n" + b"".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n".encode() for n in range(1, 40)
)
TENSOR = text("t") + struct.pack("<I", 1) + struct.pack("<Q", 64)


def attacks() -> Iterator[tuple[str, str, bool, Attack]]:
    """Yield the file, the attack, whether the input is right, and how it is made."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"):
        for told, damage in ANY_FILE.items():
            if name != "model.safetensors" or not told.endswith(("levels", "objects")):
                yield name, told, False, of_checkpoint(name, damage)
    for name in ("tokenizer.json", "model.safetensors.index.json"):
        for told in ("a sparse file of 50 GB", "a pipe", "a Git LFS pointer"):
            yield name, told, False, of_checkpoint(name, ANY_FILE[told])
    header = struct.pack("<Q", len(DEEP)) + DEEP
    yield "model.safetensors", "a header of 1,000,000 levels", False, of_checkpoint("model.safetensors", writes(header))
    for told, changes in {
        "quantization_config: []": {"quantization_config": []}, "text_config: [1]": {"text_config": [1]},
        "architectures: 3": {"architectures": 3}, "layer_types: [{}]": {"layer_types": [{}]},
        "hidden_size of 401 digits": {"hidden_size": 10**400}, "half of a surrogate pair": {"model_type": "\ud800"},
    }.items():  # fmt: skip
        yield "config.json", told, False, of_config(**changes)
    yield "config.json", "60,000,000 objects", False, of_checkpoint("config.json", many)

    strings, many_texts = struct.pack("<IQ", 8, 1 << 62), struct.pack("<IQ", 8, 2_000_000)
    for told, attack in {
        "2⁶³ keys": gguf(keys=1 << 63), "100,000 empty keys in 50 GB of zeros": gguf(keys=100_000, size=HUGE),
        "200,000 tensors in 50 GB of zeros": gguf(tensors=200_000, size=HUGE),
        "2,000,000 texts in 50 GB of zeros": gguf(keys=1, rest=key("a", 9, many_texts), size=HUGE),
        "an array of 2⁶² texts": gguf(keys=1, rest=key("a", 9, strings)),
        "a text of 2⁶² bytes": gguf(keys=1, rest=key("a", 8, struct.pack("<Q", 1 << 62))),
        "alignment 0": gguf(keys=1, rest=key("general.alignment", 4, bytes(4))),
        "a list as alignment": gguf(keys=1, rest=key("general.alignment", 9, struct.pack("<IQI", 4, 1, 32))),
        "type 4,000,000,000": gguf(tensors=1, rest=TENSOR + struct.pack("<IQ", 4_000_000_000, 0) + bytes(1000)),
        "an offset beyond the end": gguf(tensors=1, rest=TENSOR + struct.pack("<IQ", 0, 1 << 60)),
        "2³¹ dimensions": gguf(tensors=1, rest=text("t") + struct.pack("<I", 1 << 31), size=HUGE),
    }.items():  # fmt: skip
        yield "m.gguf", told, False, attack
    yield (
        "m.gguf",
        "a Git LFS pointer",
        False,
        lambda folder: [*of_command("m.gguf", writes(LFS), "plan", "--model", "FILE")(folder)],
    )

    for told, damage in {
        **ANY_FILE, "aliases that multiply": writes(LAUGHS), "merged aliases that multiply": writes(MERGES),
        "an alias to itself": writes(b"&a [*a]"), "100,000 levels of blocks": writes(b"- " * 100_000),
        "a value that aliases repeat": writes(LAUGHS + b"model: *a39\n"),
    }.items():  # fmt: skip
        yield "p.yaml", told, False, of_option("--config", "p.yaml", damage)
    yield "p.yaml", "a byte order mark", True, of_option("--config", "p.yaml", writes("\ufeffbatch_size: 2".encode()))

    auto = ("--prompt-tokens", "auto")
    for told, damage in {
        **ANY_FILE, "half of a surrogate pair": writes(rb'{"prompt": "\ud800"}'),
        "1,000,000 levels in a line": writes(b'{"prompt": "a"}\n' + DEEP),
    }.items():  # fmt: skip
        yield "w.jsonl", told, False, of_option("--workload", "w.jsonl", damage, *auto)
    separators = '{"prompt": "a\u2028b\u0085c"}'
    for told, content in {"U+2028 and U+0085": separators, "a byte order mark": "\ufeff" + separators}.items():
        yield "w.jsonl", told, True, of_option("--workload", "w.jsonl", writes(content.encode()), *auto)
    online = ("online", "--url", "http://127.0.0.1:9", "--model", "m", "--trace", "FILE", "--request-rate", "none")
    for told, damage in ANY_FILE.items():
        yield "trace.jsonl", told, False, of_command("trace.jsonl", damage, *online)
    for told, damage in {**ANY_FILE, "60,000,000 objects": many}.items():
        yield "import.json", told, False, of_command("import.json", damage, "import", "FILE")
        yield "result.json", told, False, of_command("result.json", damage, "compare", "FOLDER", "FOLDER")
        yield "sweep.json", told, False, of_command("sweep.json", damage, "upload", "FOLDER")
        yield "recommendation.json", told, False, of_command("r.json", damage, "register", "FILE", "--name", "bot")
    values = {"401 digits": "1" + "0" * 400, "100,000 digits": "9" * 100_000, "not UTF-8": "caf\udce9"}
    for told, value in values.items():
        yield "--batch-size", told, False, lambda _, value=value: ["plan", "--batch-size", value]  # type: ignore[misc]


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command under the limits. Returns its exit code, seconds, resident memory, and the lines on stderr."""
    variables = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/m.db",
        "LLMBENCH_CACHE": str(folder / "cache"), "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    with (folder / "stderr").open("wb") as said:
        begun = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "mlflow_llmbench", *map(os.fsencode, command)],  # type: ignore[list-item]
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES)),
        )
        code: int | None = None
        while code is None:
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - begun > LIMIT_S:
                child.kill()
            time.sleep(0.02)
    lines = (folder / "stderr").read_text(errors="replace").splitlines()
    return {"exit_code": code, "seconds": round(time.monotonic() - begun, 2), "rss_mb": used.ru_maxrss // 1024,
            "lines": lines}  # fmt: skip


def held(found: dict[str, Any], right: bool) -> bool:
    """Return True if an attack met the goals."""
    lines = found["lines"]
    told = len(lines) == 1 and lines[0].startswith("llmbench: ") and found["exit_code"] in (1, 2)
    well = found["exit_code"] == 0 and not any("Traceback" in line for line in lines)
    return (well if right else told) and found["seconds"] <= MOST_S and found["rss_mb"] << 20 <= MOST_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file of the table")
    parser.add_argument("--only", default="", help="only attacks whose file has this word")
    given = parser.parse_args()
    rows = []
    for file, told, right, attack in attacks():
        if given.only not in file:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            found = run(attack(folder), folder)
            ok = held(found, right)
            said = (found.pop("lines") or [""])[-1].replace(str(folder), "").encode("ascii", "replace").decode()
            rows.append({"file": file, "attack": told, **found, "held": ok, "said": said[:160]})  # fmt: skip
            one = rows[-1]
            print(f"{'held' if one['held'] else 'FELL'} {one['seconds']:6.2f} s {one['rss_mb']:5d} MB  {file}: {told}")
    fell = [one for one in rows if not one["held"]]
    print(f"{len(rows)} attacks, {len(rows) - len(fell)} held; at most {max(one['seconds'] for one in rows)} s and "
          f"{max(one['rss_mb'] for one in rows)} MB (goals: all, {MOST_S:g} s, {MOST_BYTES >> 20} MB)")  # fmt: skip
    if given.out:
        machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "limit_mb": LIMIT_BYTES >> 20}
        given.out.write_text(json.dumps({"machine": machine, "attacks": rows}, indent=1) + "\n")
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
