"""Planted secrets: `python benchmarks/planted_secrets.py [--rounds N] [--out FILE]`.

Twenty invented secrets are given to real commands in every place that a user may put them by mistake: names of
experiments, models, aliases, folders and files, params, reasons and notes, options of `launch`, addresses, results of
other programs, and the environment. Then everything that the command wrote is searched for it: its output, the names
and contents of all files, and the store. A place holds if the secret is nowhere. Each round gives every place another
secret; after twenty, each place has had all. A round takes half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import mlflow

from mlflow_llmbench.cli.main import main as llmbench

PART = "a1B2c3"
SHAPED = {
    "Hugging Face": "hf_" + PART * 6,
    "Hugging Face, short": "hf_AbCd1234",
    "GitHub": "ghp_" + PART * 6,
    "GitHub, fine-grained": "github_pat_11ABC_" + PART * 4,
    "GitLab": "glpat-" + PART * 4,
    "Slack": "xoxb-1234567890-" + PART * 3,
    "Google": "AIzaSy" + PART * 5,
    "Databricks": "dapi" + "0123abcd" * 4,
    "OpenAI": "sk-proj-" + PART * 5,
    "Anthropic": "sk-ant-api03-" + PART * 5,
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "Stripe": "sk_live_" + PART * 4,
    "npm": "npm_" + PART * 6,
    "NVIDIA": "nvapi-" + PART * 6,
    "Groq": "gsk_" + PART * 6,
}
"""Secrets that are known by their looks."""

NAMED = {
    "MLFLOW_TRACKING_PASSWORD": "correct horse 'battery'",
    "MY_SERVICE_TOKEN": "plain-canary-of-a-token",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfi",
    "DB_PASSWD": "canary_of_a_database",
}
"""Secrets that are known because a variable of this name holds them."""

FAKE = ["--backend", "fake", "--prompt-tokens", "2", "--output-tokens", "2", "--repetitions", "2", "--warmup", "1"]


def attempts(secret: str, folder: Path, sweep: str, run: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield place, command and arguments of each attempt. What they need is written below `folder`."""
    inside = secret.replace("/", "-")  # in the name of a file
    prompts = folder / "given" / f"w_{inside}.jsonl"
    foreign = folder / "given" / f"r_{inside}.json"
    for file, text in (
        (prompts, '{"prompt": "Say something."}\n'),
        (foreign, json.dumps([llama_bench(secret)])),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    out = ["--output-dir", str(folder / "out")]
    yield "name of an experiment", "run", [*FAKE, *out, "--model", "fake:ttft_ms=1", "--experiment", f"o_{secret}"]
    yield "path of a model", "run", [*FAKE, *out, "--model", f"/data/o_{secret}/m"]
    yield "paths of two models", "run", [*FAKE, *out, "--model", f"/data/{secret}/m,n_{secret}"]
    yield (
        "output folder",
        "run",
        [*FAKE, "--model", "fake:ttft_ms=1", "--output-dir", str(folder / f"given/o_{inside}")],
    )
    workload = ["--workload", str(prompts), "--prompt-tokens", "auto"]
    yield "file of a workload", "run", [*FAKE, *out, "--model", "fake:ttft_ms=1", *workload]
    yield "value of a param", "run", [*FAKE, *out, "--model", "fake:ttft_ms=1", "--quant", secret]
    yield "path of a model", "plan", [*FAKE, "--model", f"/data/o_{secret}/m"]
    yield "sides", "ab", ["--a", f"model=a_{secret}", "--b", f"model=b_{secret}", *FAKE, *out, "--pairs", "2"]
    for place, option in (
        ("option of launch", f"--api-key {secret}"),
        ("another option of launch", f"--seed {secret}"),
        ("quoted option of launch", f"--header 'x-thing: {secret}'"),
    ):
        command = f"{sys.executable} -m absent {option} --port {{port}}"
        yield place, "online", ["--launch", command, "--model", "m", *out]
    yield "variable of launch", "online", ["--launch", f"env A_KEY={secret} serve {{port}}", "--model", "m", *out]
    yield "user of an address", "online", ["--url", f"http://u:{quote(secret, safe='')}@127.0.0.1:1", "--model", "m"]
    yield "name of an experiment", "upload", [sweep, "--experiment", f"u_{secret}"]
    yield "reason", "recommend", [sweep, "--accept-suspect", f"because {secret}", "--output", str(folder / "best")]
    yield "reference", "compare", [sweep, f"/results/{secret}"]
    yield "comparison of a run", "compare", [sweep, sweep, "--log", run, "--output", str(folder / "compared")]
    yield "name of a version", "register", [run, "--name", f"bot-{secret}", "--accept-suspect", "test"]
    yield "alias of a version", "register", [run, "--name", "bot", "--alias", inside[:200]]
    yield "reason", "register", [run, "--name", "bot", "--accept-suspect", f"because {secret}"]
    yield "reference", "gate", [run, "--against", f"models:/bot-{secret}@champion"]
    yield "reference", "promote", [f"models:/bot-{secret}@candidate"]
    yield "reference", "export", [f"models:/bot-{secret}@champion", "--target", "command"]
    yield "reference", "reproduce", [f"/results/{secret}", *out]
    yield "text and name of a file", "import", [str(foreign), "--experiment", f"i_{secret}"]
    yield "reference", "scaling", [f"/results/{secret}"]
    yield "results", "study", ["--of", f"/results/{secret}"]
    yield (
        "password of a store",
        "run",
        [*FAKE, "--model", "n", "--tracking-uri", f"ftp://u:{quote(secret, safe='')}@h/x"],
    )


def llama_bench(secret: str) -> dict[str, Any]:
    """Return a result of llama-bench whose texts hold the secret."""
    facts = {"build_commit": secret, "cpu_info": secret, "gpu_info": "", "model_filename": f"/m/o_{secret}.gguf"}
    numbers = {"n_batch": 512, "n_threads": 2, "n_prompt": 0, "n_gen": 16, "avg_ns": 1e9, "stddev_ns": 1e6}
    rates = {"avg_ts": 16.0, "stddev_ts": 0.1, "samples_ns": [1e9, 1.1e9], "samples_ts": [16.0, 15.0]}
    more = {"model_type": f"llama {secret}", "model_size": 10**8, "model_n_params": 10**8, "type_k": "f16"}
    return {
        **facts,
        **numbers,
        **rates,
        **more,
        "type_v": "f16",
        "n_gpu_layers": 0,
        "test_time": "2026-01-01T00:00:00Z",
    }


def spellings(secret: str) -> set[bytes]:
    """Return the secret as it is written in texts, addresses and JSON."""
    return {one.encode() for one in (secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1])}


def found(secret: str, folder: Path, shown: str) -> list[str]:
    """Return where the secret is: on the terminal, in a file, or in a file's name. What we planted does not count."""
    wanted = spellings(secret)
    places = ["terminal"] if any(one in shown.encode() for one in wanted) else []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if parts[0] == "given":
            parts = parts[2:]  # a folder with a planted name
        if not parts:
            continue
        places += [f"name {'/'.join(parts)}"] if any(one in "/".join(parts).encode() for one in wanted) else []
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            places += ["/".join(parts)] if any(one in content for one in wanted) else []
    return places


def call(command: str, arguments: list[str]) -> tuple[int, str]:
    """Call a command; return its exit code, and what it has shown."""
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])  # which an earlier call has set for this process
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = llmbench([command, *arguments])
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue()


def attack(secrets: Sequence[tuple[str, str]], number: int) -> list[dict[str, Any]]:
    """Make one attempt in each place, in a folder and a store of their own. Round `number` chooses the secrets."""
    rows: list[dict[str, Any]] = []
    known: set[str] = set()  # what an earlier command has let out
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        _, shown = call("run", [*FAKE, "--model", "fake:ttft_ms=1", "--output-dir", str(folder / "first"), "--json"])
        first = json.loads(shown.splitlines()[-1])
        count = len(list(attempts("none", folder, "", "")))
        for place in range(count):
            kind, secret = secrets[(place + number) % len(secrets)]
            given = list(attempts(secret, folder, first["folder"], first["runs"][0]["run_id"]))
            where, command, arguments = given[place]
            code, shown = call(command, arguments)
            traces = [trace for trace in found(secret, folder, shown) if trace not in known]
            known.update(trace for trace in traces if trace != "terminal")
            traces += ["a traceback"] if "Traceback" in shown else []
            rows.append({"secret": kind, "command": command, "place": where, "code": code, "found": traces})
        os.chdir("/")
    return rows


def main() -> int:
    """Make the attempts and print the table. Returns the exit code: 0 if all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    given = parser.parse_args()
    out = Path(given.out).resolve() if given.out else None
    os.environ.update(NAMED)
    secrets = list({**SHAPED, **NAMED}.items())
    rows = []
    for number in range(given.rounds):
        rows += attack(secrets, number)
        print(f"round {number + 1}: {sum(bool(row['found']) for row in rows)} of {len(rows)} escaped", file=sys.stderr)
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        own = table.setdefault(f"{row['command']}: {row['place']}", {"attempts": 0, "held": 0})
        own["attempts"] += 1
        own["held"] += not row["found"]
    total = {name: sum(row[name] for row in table.values()) for name in ("attempts", "held")}
    tried = {kind: sum(row["secret"] == kind for row in rows) for kind, _ in secrets}
    escaped = [row for row in rows if row["found"]]
    result = {"total": total, "secrets": tried, "places": table, "escaped": escaped}
    text = json.dumps(result, indent=1) + "\n"
    if out:
        out.write_text(text)
    print(text)
    return int(total["held"] != total["attempts"])


if __name__ == "__main__":
    sys.exit(main())
