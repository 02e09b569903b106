"""Plugin of `mlflow deployments` for the target `llmbench`: this machine.

MLflow loads this module when the target is named, by the entry point `mlflow.deployments`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import click
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException

from ..records.errors import LlmbenchError
from . import deployments

HELP = """Serve versions that `llmbench register` has made, on this machine.

  mlflow deployments create -t llmbench --name support-bot -m models:/support-bot@champion
  mlflow deployments get -t llmbench --name support-bot
  mlflow deployments predict -t llmbench --name support-bot -I prompts.json
  mlflow deployments update -t llmbench --name support-bot -m models:/support-bot/4
  mlflow deployments delete -t llmbench --name support-bot

The server runs on after the command, on loopback. After a restart of the machine it is stopped: `update` without -m
starts it again. The version must be as it was registered. Settings (-C name=value):

  server     mlflow (default: `mlflow models serve`, the version as it was measured), or vllm, sglang, llama.cpp, tgi,
             with the options of `llmbench export`
  host       address to listen on (default: 127.0.0.1)
  port       port (default: auto, a free one; `update` then takes another, without a gap if memory allows)
  timeout_s  seconds until it must answer (default: 3600)
  force      true: start although the memory that was measured is not free
"""


class DeploymentError(MlflowException, click.ClickException):  # type: ignore[misc]
    """An error of a deployment. The command line of MLflow prints it in one line, since it is click's too."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except LlmbenchError as error:
        raise DeploymentError(str(error)) from None


def target_help() -> str:
    """Return the help of this target."""
    return HELP


def run_local(
    target: str, name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, str] | None = None
) -> None:
    """Deploy on this machine, which `create` does too."""
    with _told():
        deployments.create(name, model_uri, config or {})


class LlmbenchDeployments(BaseDeploymentClient):
    """Deployments of registered versions on this machine. Every method raises DeploymentError."""

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, str] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Start the server of a version, wait until it answers, and return its summary."""
        with _told():
            return deployments.summary(deployments.create(name, model_uri, config or {}))

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, str] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Serve another version, or start the same one again; return the summary."""
        with _told():
            return deployments.summary(deployments.update(name, model_uri, config or {}))

    def delete_deployment(
        self, name: str, config: Mapping[str, str] | None = None, endpoint: str | None = None
    ) -> None:
        """End the server and remove what is kept of it. Nothing happens if there is none."""
        with _told():
            deployments.delete(name)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """Return the summaries of all deployments."""
        with _told():
            return deployments.summaries()

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Return version, address, health, memory and log of a deployment."""
        with _told():
            return deployments.describe(deployments.require(name))

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> PredictionsResponse:
        """Return the answers of a deployment to rows with a `prompt`."""
        with _told():
            return PredictionsResponse({"predictions": deployments.predict(deployment_name or "", inputs)})
