"""Calls of the public functions, for mypy alone (`make lint`). A line with an ignored error must have that error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_llmbench import compare, load_results, online, recommend, register, run

if TYPE_CHECKING:
    from pandas import DataFrame


def accepted() -> None:
    result = run(model="opt-125m", weights="random", quant="int8,int4", batch_size=[1, 4], repetitions="auto")
    result = run(model=Path("models/mine"), batch_size="1,4", request_rate=2.5, batching=["static", "dynamic"])
    result = run(precision_target=0.05, load_timeout_s="none", memory_limit="6GB", progress=False)
    result = online(url="http://127.0.0.1:8000", model="m", concurrency=[1, 8], slo_ttft_ms=200)
    rate: float = result.best("throughput").metrics["throughput/output_tokens_per_s"]
    frame: DataFrame = result.to_pandas()
    loaded = load_results(result.folder)
    word: str = compare(loaded[0], loaded.best().linked).effects[0].effect
    uri: str = register(str(result.folder), "bot", accept_suspect="a busy machine").uri
    recommend([result.folder.name], "throughput").to_pandas()
    recommend("latest"), recommend(result), recommend([result, loaded[0]]), recommend(loaded)
    compare(result), compare(result, loaded[0]), compare(Path("a"), "latest")
    print(rate, frame, word, uri)


def refused() -> None:
    run(batch_sise=1)  # type: ignore[call-arg]
    run(weights="randomly")  # type: ignore[arg-type]
    run(warmup="ten")  # type: ignore[arg-type]
    run(output_tokens=[None])  # type: ignore[list-item]
    run(url="http://127.0.0.1:8000")  # type: ignore[call-arg]
    online(url="http://127.0.0.1:8000", batch_size=4)  # type: ignore[call-arg]
    run(progress="yes")  # type: ignore[arg-type]
    run(quant="int4").best(3)  # type: ignore[arg-type]
    recommend("throughput", limits=0)  # type: ignore[arg-type]
