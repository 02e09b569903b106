"""Nothing secret and nothing of another folder reaches a store, whichever module sends it."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.tracking.registry import register
from mlflow_llmbench.tracking.store import open_store

KEY = "hf_AbCdEfGh0123456789"


def test_each_text_is_masked(store_uri: str) -> None:
    store = open_store(store_uri, f"o_{KEY}")
    assert open_store(store_uri, f"o_{KEY}").experiment_id == store.experiment_id
    client = store.client
    run = client.create_run(store.experiment_id, tags={"a": KEY, "mlflow.runName": f"n {KEY}"}).info.run_id
    client.set_tag(run, "b", f"b_{KEY}")
    client.log_batch(run, [Metric("m", 1.5, 1, 0)], [Param("p", f"/data/o_{KEY}/m")], [RunTag("c", KEY)])
    data = Dataset(f"d_{KEY}", "1", "local", f'{{"uri": "{KEY}"}}', profile=KEY)
    client.log_inputs(run, [DatasetInput(data, [InputTag("t", KEY)])])
    client.set_experiment_tag(store.experiment_id, "e", KEY)
    client.create_registered_model("model", description=KEY)
    client.create_model_version("model", "s3://x", run, {"v": KEY}, description=KEY)
    plain = MlflowClient(store_uri)
    found = plain.get_run(run)
    assert plain.get_experiment(store.experiment_id).name == "o_***"
    assert (found.info.run_name, found.data.tags["a"], found.data.tags["b"]) == ("n ***", "***", "b_***")
    assert (found.data.params["p"], found.data.metrics["m"]) == ("/data/o_***/m", 1.5)
    assert found.inputs.dataset_inputs[0].dataset.name == "d_***"
    for file in Path(store_uri.removeprefix("sqlite:///")).parent.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_an_experiment_that_was_there_under_this_name_is_used(store_uri: str) -> None:
    made = MlflowClient(store_uri).create_experiment(f"of-mine-{KEY}")
    assert open_store(store_uri, f"of-mine-{KEY}").experiment_id == made


def test_only_a_folders_own_files_are_uploaded(store_uri: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    (outside / "deep").mkdir(parents=True)
    (folder / "sub").mkdir(parents=True)
    for file in (
        outside / "secret.txt",
        outside / "deep" / "secret.txt",
        folder / "own.txt",
        folder / "sub" / "own.txt",
    ):
        file.write_text("text")
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "sub" / "folder").symlink_to(outside / "deep")
    (folder / "absent").symlink_to(outside / "absent")
    (folder / "loop").symlink_to(folder)
    os.link(outside / "secret.txt", folder / "hard.txt")
    os.mkfifo(folder / "pipe")
    store = open_store(store_uri, "x")
    run = store.client.create_run(store.experiment_id).info.run_id
    store.client.log_artifacts(run, str(folder), "under")
    target = Path(store.client.get_run(run).info.artifact_uri.removeprefix("file://"))
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()) == [
        "under/own.txt",
        "under/sub/own.txt",
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("log_artifacts", ["run_id", "local_dir", "artifact_path"]),
        ("log_model_artifacts", ["model_id", "local_dir", "artifact_path"]),
    ],
)
def test_methods_that_upload_a_folder_have_mlflows_arguments(name: str, arguments: list[str]) -> None:
    assert list(inspect.signature(getattr(MlflowClient, name)).parameters)[1:] == arguments


def test_a_store_that_refuses_the_first_file_is_asked_for_no_other(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text("text")
    asked: list[str] = []

    def refuse(_: Any, run_id: str, file: str, under: str | None) -> None:
        asked.append(Path(file).name)
        raise OSError("no")

    store = open_store(store_uri, "x")
    run = store.client.create_run(store.experiment_id).info.run_id
    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    with pytest.raises(OSError, match="no"):
        store.client.log_artifacts(run, str(folder))
    assert asked == ["00.txt"]


@pytest.mark.parametrize("names", [(f"bot-{KEY}", "candidate"), ("bot", KEY)])
def test_a_version_is_not_named_by_a_key(names: tuple[str, str], store_uri: str) -> None:
    with pytest.raises(UsageError, match=r"has what looks like a key in it, and would be stored: (bot-)?\*\*\*\. Give"):
        register(open_store(store_uri), "0" * 32, *names)
