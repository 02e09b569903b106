"""The table of presets: the marks of what fits, and the format of numbers."""

import json

from mlflow_llmbench.config.models import PRESETS
from mlflow_llmbench.reports.presets import models_json, models_table, parameters_text


def rows(table: str) -> dict[str, str]:
    return {line.split()[0]: line for line in table.splitlines()[4:]}


def test_the_table_on_a_cpu() -> None:
    lines = models_table(13_000_000_000, None).splitlines()
    assert lines[:4] == [
        "Estimated peak memory in GB, loading included, at batch 1 with 128 + 128 tokens; "
        "none = as published, fp16 or bf16.",
        "No mark: fits in 13.0 GB free here. no: does not fit.",
        "",
        "model           params  context  none     fp32     int8     int4     licence",
    ]
    assert lines[6] == "opt-1.3b        1.32 B     2048   2.7      5.4      1.6      1.1     opt-175b"
    found = rows("\n".join(lines))
    assert list(found) == list(PRESETS)
    assert found["llama-2-7b"] == "llama-2-7b      6.74 B     4096  13.6 no  27.2 no   7.2      4.6     llama2, gated"


def test_the_table_with_a_gpu() -> None:
    table = models_table(24_000_000_000, 8_000_000_000)
    assert (
        table.splitlines()[1]
        == "No mark: fits in 8.0 GB of device memory. cpu: only in 24.0 GB free here, with device=cpu. "
        "no: does not fit."
    )
    assert (
        rows(table)["opt-6.7b"] == "opt-6.7b        6.66 B     2048  13.5 cpu  26.9 no    7.6       5.1      opt-175b"
    )
    alone = models_table(None, 8_000_000_000)
    assert alone.splitlines()[1] == "No mark: fits in 8.0 GB of device memory. no: does not fit."
    assert "13.5 no " in rows(alone)["opt-6.7b"]


def test_the_table_where_memory_is_not_known() -> None:
    table = models_table(None, None)
    assert table.splitlines()[1] == "How much memory is free here is not known."
    assert " no" not in "".join(rows(table).values())


def test_the_larger_of_loading_and_running_decides() -> None:
    by_name = {model["name"]: model for model in models_json(1_100_000_000, 4_200_000_000)}
    assert list(by_name) == list(PRESETS)
    model = by_name["opt-1.3b"]
    assert {key: model[key] for key in model if key != "memory"} == {
        "name": "opt-1.3b",
        "repository": "facebook/opt-1.3b",
        "parameters": 1_315_758_080,
        "context": 2048,
        "dtype": "float16",
        "licence": "opt-175b",
        "gated": False,
    }
    assert list(model["memory"]) == ["none", "fp32", "int8", "int4"]
    for size in model["memory"].values():
        assert size["peak_bytes"] == max(size["run_bytes"], size["load_bytes"])
    assert model["memory"]["int4"]["load_bytes"] > 1_100_000_000 > model["memory"]["int4"]["run_bytes"]
    assert [model["memory"][q]["fits_host"] for q in ("none", "int4")] == [False, False]
    roomier = {model["name"]: model for model in models_json(1_200_000_000, None)}["opt-1.3b"]["memory"]
    assert [roomier[q]["fits_host"] for q in ("none", "int4")] == [False, True]
    assert [model["memory"][q]["fits_device"] for q in ("fp32", "int8")] == [False, True]
    assert json.loads(json.dumps(models_json(None, None)))[0]["memory"]["none"]["fits_device"] is None


def test_numbers_of_parameters_have_three_digits() -> None:
    counts = (
        70_426_624,
        99_960_000,
        125_239_296,
        999_499_999,
        999_885_952,
        1_315_758_080,
        9_994_000_000,
        9_996_000_000,
        11_846_072_320,
        175e9,
    )
    assert [parameters_text(int(count)) for count in counts] == [
        "70.4 M",
        "100 M",
        "125 M",
        "999 M",
        "1.00 B",
        "1.32 B",
        "9.99 B",
        "10.0 B",
        "11.8 B",
        "175 B",
    ]
